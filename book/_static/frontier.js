/* The interactive frontier: draws a notebook's rows where its static figure stands. The figure stays for print and
   without JavaScript. The data file, loaded after this one, calls saelibFrontier(data). */
(function () {
  "use strict";

  const { make, svg } = window.saelibDom;
  const WIDE = { width: 620, height: 320, left: 62, right: 104, top: 14, bottom: 48 };
  const NARROW = { width: 350, height: 320, left: 60, right: 74, top: 12, bottom: 48 };
  const isNarrow = window.matchMedia("(max-width: 600px)");
  const FIELDS = {
    method: "method", sparsity: "k or λ", seed: "seed", l0: "L0", normalized_mse: "normalized MSE", subject: "subject", n_latents: "latents n",
    n_tokens: "training tokens", device: "device",
  };

  const LABEL_ROOM = 24;  // pixels between the labels of an axis
  const STEPS = [[1], [1, 2, 5], [1, 1.5, 2, 3, 5, 7], [1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8]];  // times powers of ten

  const unique = (values) => [...new Set(values)];

  /* The values of one of the STEPS between two others. */
  function ticks(steps, low, high) {
    const values = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
      values.push(...steps.map((step) => Number((step * 10 ** power).toPrecision(3))));
    }
    return values.filter((value) => value >= low * 0.999 && value <= high * 1.001);
  }

  /* A logarithmic scale that covers the values with a margin, and has as many labels as have room. */
  function scale(values, from, to) {
    const pad = Math.max(0.04, 0.06 * Math.log(Math.max(...values) / Math.min(...values)));
    const low = Math.log(Math.min(...values)) - pad, high = Math.log(Math.max(...values)) + pad;
    const at = (value) => from + (to - from) * (Math.log(value) - low) / (high - low);
    const fits = (values) => values.every((value, i) => !i || Math.abs(at(value) - at(values[i - 1])) >= LABEL_ROOM);
    at.ticks = STEPS.map((steps) => ticks(steps, Math.exp(low), Math.exp(high))).filter(fits).pop();
    return at;
  }

  const SHAPES = {
    o: "M-4.5,0a4.5,4.5 0 1,0 9,0a4.5,4.5 0 1,0 -9,0", s: "M-4,-4H4V4H-4Z", "^": "M0,-5L5,4H-5Z", v: "M0,5L5,-4H-5Z",
    D: "M0,-5.5L5.5,0L0,5.5L-5.5,0Z", x: "M-4,-4L4,4M-4,4L4,-4", "+": "M-5,0H5M0,-5V5",
  };

  class Chart {
    /* runs: profile -> {about, rows}, the profile of the page first. */
    constructor(runs, methods, figure) {
      this.runs = runs;
      this.methods = methods;
      this.figure = figure;
      this.profile = Object.keys(runs)[0];
      this.subject = this.rows[0].subject;
      this.n = null;
      this.chart = make("div");
      this.readout = make("p", { class: "readout", role: "status" });
      this.origin = make("p", { class: "origin" });
      this.table = make("div", { class: "rows", tabindex: "0", role: "group", "aria-label": "The runs in this figure" });
      this.size = isNarrow.matches ? NARROW : WIDE;
      isNarrow.addEventListener("change", () => { this.size = isNarrow.matches ? NARROW : WIDE; this.draw(); });
      this.details = make("details", {}, make("summary", {}, "The runs in this figure"), this.table);
      this.controls = make("div", { class: "book-controls" });
      this.element = make("div", { class: "frontier-live" }, this.controls, this.chart, this.readout, this.origin, this.details);
      this.drawControls();
      this.draw();
    }

    get rows() {
      return this.runs[this.profile].rows;
    }

    subjects() {
      return unique(this.rows.map((row) => row.subject));
    }

    sizes() {
      return unique(this.rows.filter((row) => row.subject === this.subject).map((row) => row.n_latents)).sort((a, b) => a - b);
    }

    shown() {
      return this.rows.filter((row) => row.subject === this.subject && row.n_latents === this.n);
    }

    color(key) {
      return `var(--method-${key}, ${this.methods[key].color})`;
    }

    /* A box that sets the property `name`. */
    select(name, text, values) {
      const onchange = () => { this[name] = name === "n" ? Number(box.value) : box.value; this.drawControls(); this.draw(); };
      const box = make("select", { name, onchange }, ...values.map((v) => make("option", { value: v }, String(v))));
      box.value = this[name];
      return make("label", {}, text, box);
    }

    drawControls() {
      if (!this.subjects().includes(this.subject)) this.subject = this.subjects()[0];
      const profiles = Object.keys(this.runs), sizes = this.sizes();
      if (!sizes.includes(this.n)) this.n = sizes[sizes.length - 1];
      const controls = [make("button", { type: "button", name: "flip", onclick: () => this.flip() }, this.flipped ? "Interactive figure" : "Static figure")];
      if (!this.flipped) {
        if (sizes.length > 1) controls.unshift(this.select("n", "Latents n", sizes));
        if (profiles.length > 1) controls.unshift(this.select("profile", "Profile", profiles));
        controls.unshift(this.select("subject", "Subject", this.subjects()));
      }
      const focused = this.controls.contains(document.activeElement) ? document.activeElement.name : "";
      this.controls.replaceChildren(...controls);
      this.controls.querySelector(`[name="${focused}"]`)?.focus();
    }

    /* Swap the drawn figure and the static one. */
    flip() {
      this.flipped = !this.flipped;
      showStatic(this.figure, this.flipped);
      for (const part of [this.chart, this.readout, this.origin, this.details]) part.hidden = this.flipped;
      this.drawControls();
    }

    describe(row) {
      const method = this.methods[row.method], knob = { k: "k", l1_coef: "λ" }[method.knob] || method.knob;
      return `${method.label}, ${knob} = ${row.sparsity}: L0 ${row.l0.toFixed(1)}, normalized MSE ${row.normalized_mse.toFixed(4)}. `
        + `${row.subject}, n = ${row.n_latents.toLocaleString("en")}, seed ${row.seed}, ${row.n_tokens.toLocaleString("en")} training tokens, ${row.device}.`;
    }

    draw() {
      const order = Object.keys(this.methods);
      const rows = this.shown().sort((a, b) => order.indexOf(a.method) - order.indexOf(b.method) || a.sparsity - b.sparsity || a.seed - b.seed);
      this.x = scale(rows.map((row) => row.l0), this.size.left, this.size.width - this.size.right);
      this.y = scale(rows.map((row) => row.normalized_mse), this.size.height - this.size.bottom, this.size.top);
      this.points = rows.map((row, i) => this.point(row, i));
      const keys = Object.keys(this.methods).filter((key) => rows.some((row) => row.method === key));
      this.chart.replaceChildren(svg("svg", { class: "chart", viewBox: `0 0 ${this.size.width} ${this.size.height}`, role: "group",
        "aria-label": `Normalized MSE against L0 on ${this.subject}, ${rows.length} runs. Arrow keys go from run to run.` },
      ...this.axes(), ...this.lines(keys, rows), ...this.points));
      this.follow(this.chart.firstChild, rows);
      this.readout.textContent = "Point at a run to read it, or use Tab and the arrow keys. A click shows its row.";
      const seeds = new Set(rows.map((row) => row.seed)).size;
      const tokens = [...new Set(rows.map((row) => row.n_tokens.toLocaleString("en")))].join(" or ");
      this.origin.textContent = `Profile ${this.profile}: ${seeds} ${seeds === 1 ? "seed" : "seeds"}, ${tokens} training tokens each. ${this.runs[this.profile].about}`;
      this.drawTable(rows);
    }

    /* The pointer reads the nearest run, for runs that differ in their seed lie on one another. */
    follow(drawing, rows) {
      const nearest = (event) => {
        if (event.detail === 0 && event.type === "click") return this.points.indexOf(event.target.closest(".point"));
        const box = drawing.getBoundingClientRect(), zoom = this.size.width / box.width;
        const at = [(event.clientX - box.left) * zoom, (event.clientY - box.top) * zoom];
        const away = rows.map((row) => Math.hypot(this.x(row.l0) - at[0], this.y(row.normalized_mse) - at[1]));
        const least = Math.min(...away);
        return least < 28 ? away.indexOf(least) : -1;
      };
      drawing.addEventListener("pointermove", (event) => {
        const i = nearest(event);
        this.points.forEach((point, at) => point.classList.toggle("near", at === i));
        if (i >= 0) this.readout.textContent = this.describe(rows[i]);
      });
      drawing.addEventListener("click", (event) => { const i = nearest(event); if (i >= 0) this.pick(i); });
    }

    axes() {
      const { left, right, top, bottom, width, height } = this.size, parts = [];
      for (const value of this.x.ticks) {
        parts.push(svg("line", { class: "grid", x1: this.x(value), x2: this.x(value), y1: top, y2: height - bottom }),
          svg("text", { x: this.x(value), y: height - bottom + 17, "text-anchor": "middle" }, String(value)));
      }
      for (const value of this.y.ticks) {
        parts.push(svg("line", { class: "grid", x1: left, x2: width - right, y1: this.y(value), y2: this.y(value) }),
          svg("text", { x: left - 8, y: this.y(value) + 4, "text-anchor": "end" }, String(value)));
      }
      parts.push(svg("text", { x: (left + width - right) / 2, y: height - 8, "text-anchor": "middle" }, "active latents per token, L0"),
        svg("text", { transform: `translate(14 ${(top + height - bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, "normalized MSE"));
      return parts;
    }

    /* A line a method, through the mean L0 and the geometric mean of the errors of runs that differ in their seed, and where there are
       three a band from the least to the greatest. A label stands at the right end of its line, or below its left where another line goes on there. */
    lines(keys, rows) {
      const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
      const path = (points) => points.map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`).join("L");
      const drawn = keys.map((key) => {
        const own = rows.filter((row) => row.method === key);
        const groups = unique(own.map((row) => row.sparsity)).map((sparsity) => {
          const seeds = own.filter((row) => row.sparsity === sparsity), errors = seeds.map((row) => row.normalized_mse);
          const [middle, most, least] = [Math.exp(mean(errors.map(Math.log))), Math.max(...errors), Math.min(...errors)].map(this.y);
          return { x: this.x(mean(seeds.map((row) => row.l0))), middle, most, least, n: seeds.length };
        }).sort((a, b) => a.x - b.x);
        return { key, groups, end: groups[groups.length - 1], right: this.x(Math.max(...own.map((row) => row.l0))) };
      });
      const height = (groups, x) => {
        const i = groups.findIndex((group) => group.x > x), from = groups[i - 1], to = groups[i];
        return i > 0 ? from.middle + (to.middle - from.middle) * (x - from.x) / (to.x - from.x) : NaN;
      };
      const passes = (end) => drawn.some(({ groups }) => [15, 30, 45].some((room) => Math.abs(height(groups, end.x + room) - end.middle) < 12));
      const ends = drawn.map(({ key, end, right }) => passes(end) ? { key, x: end.x - 10, y: end.middle + 14, anchor: "end" } : { key, x: right + 10, y: end.middle + 4, anchor: "start" });
      ends.sort((a, b) => a.y - b.y);
      ends.forEach((end, i) => { if (i && end.y - ends[i - 1].y < 15 && Math.abs(end.x - ends[i - 1].x) < 90) end.y = ends[i - 1].y + 15; });
      return [
        ...drawn.filter(({ groups }) => Math.max(...groups.map(({ n }) => n)) >= 3).map(({ key, groups }) => svg("path", { class: "band", style: `fill:${this.color(key)}`,
          d: `M${path([...groups.map(({ x, most }) => [x, most]), ...groups.toReversed().map(({ x, least }) => [x, least])])}Z` })),
        ...drawn.map(({ key, groups }) => svg("path", { class: "mean", d: `M${path(groups.map(({ x, middle }) => [x, middle]))}`, style: `stroke:${this.color(key)}` })),
        ...ends.map(({ key, x, y, anchor }) => svg("text", { class: "end", x, y, "text-anchor": anchor, style: `fill:${this.color(key)}` }, this.methods[key].label)),
      ];
    }

    point(row, i) {
      const { marker } = this.methods[row.method];
      const point = svg("g", { class: "point", transform: `translate(${this.x(row.l0).toFixed(1)} ${this.y(row.normalized_mse).toFixed(1)})`,
        role: "button", tabindex: i ? "-1" : "0", "aria-label": this.describe(row), "aria-pressed": "false" },
      svg("circle", { class: "ring", r: 9 }),
      svg("path", { d: SHAPES[marker] || SHAPES.o, style: `stroke:${this.color(row.method)};stroke-width:1.6;fill:var(--pst-color-background)` }));
      point.addEventListener("focus", () => { this.readout.textContent = this.describe(row); });
      point.addEventListener("keydown", (event) => this.key(event, i));
      return point;
    }

    key(event, i) {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -i, End: this.points.length - 1 - i }[event.key];
      if (event.key === "Enter" || event.key === " ") this.pick(i);
      else if (step === undefined) return;
      else this.stop((i + step + this.points.length) % this.points.length).focus();
      event.preventDefault();
    }

    /* Make one point the chart's stop for Tab. */
    stop(i) {
      this.points.forEach((point, at) => point.setAttribute("tabindex", at === i ? "0" : "-1"));
      return this.points[i];
    }

    pick(i) {
      this.stop(i);
      this.points.forEach((point, at) => point.setAttribute("aria-pressed", String(at === i)));
      this.details.open = true;
      [...this.table.querySelectorAll("tbody tr")].forEach((line, at) => {
        line.classList.toggle("chosen", at === i);
        line.toggleAttribute("aria-current", at === i);
        if (at === i) this.table.scrollTop = line.offsetTop - this.table.offsetTop - this.table.clientHeight / 2;
      });
      this.readout.textContent = this.points[i].getAttribute("aria-label");
    }

    drawTable(rows) {
      const cell = (row, name) => name === "method" ? this.methods[row.method].label : typeof row[name] === "number" && name !== "sparsity"
        ? (Number.isInteger(row[name]) ? row[name].toLocaleString("en") : name === "l0" ? row[name].toFixed(1) : row[name].toFixed(4)) : String(row[name]);
      const head = make("tr", {}, ...Object.values(FIELDS).map((text) => make("th", { scope: "col" }, text)));
      const body = rows.map((row) => make("tr", {}, ...Object.keys(FIELDS).map((name) => make("td", {}, cell(row, name)))));
      this.table.replaceChildren(make("table", {}, make("thead", {}, head), make("tbody", {}, ...body)));
    }
  }

  function pictureOf(name) {
    return document.querySelector(`img[data-frontier="${name}"]`) || (name && document.getElementById(name)?.querySelector("img"));
  }

  function showStatic(picture, visible) {
    picture.style.display = visible ? "" : "none";
    picture.toggleAttribute("data-frontier-hidden", !visible);
  }

  window.saelibFrontier = ({ methods, profiles }) => {
    const all = Object.entries(profiles);
    for (const name of Object.keys(all[0][1].figures)) {
      const picture = pictureOf(name);
      if (!picture) continue;
      const runs = Object.fromEntries(all.filter(([, run]) => run.figures[name]).map(([profile, run]) => [profile, { about: run.about, rows: run.figures[name] }]));
      const holder = picture.closest("a.image-reference") || picture;
      const chart = new Chart(runs, methods, holder);
      holder.before(chart.element);
      showStatic(holder, false);
    }
  };
})();
