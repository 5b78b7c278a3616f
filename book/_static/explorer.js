/* The latent explorer. Its data are scripts that call saelibExplorer(name, value): see tools/make_explorer.py. */
(function () {
  "use strict";

  const place = document.getElementById("latent-explorer");
  if (!place) return;

  // Data

  const root = new URL(place.dataset.root, document.baseURI);
  const arrived = new Map();
  const asked = new Map();
  window.saelibExplorer = (name, value) => arrived.set(name, value);

  function load(name) {
    if (!asked.has(name)) {
      asked.set(name, new Promise((resolve, reject) => {
        const script = document.createElement("script");
        script.src = new URL(`${name}.js`, root);
        script.onload = () => resolve(arrived.get(name));
        script.onerror = () => { asked.delete(name); reject(new Error(`${name}.js could not be loaded`)); };
        document.head.append(script);
      }));
    }
    return asked.get(name);
  }

  const latentOf = async (key, i) => (await load(`${key}-${Math.floor(i / index.about.chunk)}`))[i % index.about.chunk];

  // Small builders

  const { make, svg } = window.saelibDom;
  const visible = (text) => text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/^ +| +$/g, (spaces) => "␣".repeat(spaces.length)) || "∅";
  const token = (id) => make("span", { class: "tok" }, visible(index.tokens[id]));
  const percent = (millionths) => millionths >= 1000 ? `${(millionths / 1e4).toFixed(millionths >= 1e5 ? 0 : 1)} %` : `${(millionths / 1e4).toFixed(3)} %`;
  const thousandths = (value) => (value / 1000).toFixed(3);
  const other = (key) => Object.keys(index.saes).find((name) => name !== key);
  const label = (key) => index.about.saes[key].label;
  const tint = (share) => share > 0 ? `rgba(var(--explorer-tint), calc(var(--explorer-strength) * ${(0.05 + 0.95 * Math.min(1, share)).toFixed(3)}))` : "transparent";

  /* A token in running text: line breaks are drawn, and break the line. */
  function inText(id, share, title, extra = {}) {
    const text = index.tokens[id];
    const span = make("span", { class: "t", title, style: share > 0 ? `background:${tint(share)}` : null, ...extra });
    for (const piece of text.split(/(\n)/)) {
      if (piece === "\n") span.append(make("span", { class: "glyph", "aria-hidden": "true" }, "⏎"), "\n");
      else if (piece) span.append(piece);
    }
    return span;
  }

  // State

  let index = null;
  const state = { sae: "topk", latent: 0, sort: "frequency", query: "", where: "fires_on", shown: 100, twin: true, order: [] };
  const parts = {};

  const readHash = () => {
    const found = /^#([a-z0-9]+)-(\d+)$/.exec(location.hash);
    return found && index.saes[found[1]] && Number(found[2]) < index.saes[found[1]].max.length
      ? { sae: found[1], latent: Number(found[2]) } : null;
  };

  // The list

  function matching(query) {
    const exact = [], loose = [];
    const wanted = query.trim().toLowerCase();
    index.tokens.forEach((text, id) => {
      if (text === query || text.trim() === query.trim()) exact.push(id);
      else if (wanted && text.toLowerCase().includes(wanted)) loose.push(id);
    });
    return new Set(exact.length ? exact : loose);
  }

  function score(sae, i, ids) {
    if (state.where === "raises") {
      const rank = sae.raises[i].findIndex((id) => ids.has(id));
      return rank < 0 ? 0 : sae.raises[i].length - rank;
    }
    let share = 0;
    for (let at = 0; at < sae.fires_on[i].length; at += 2) if (ids.has(sae.fires_on[i][at])) share += sae.fires_on[i][at + 1];
    return share;
  }

  function arrange() {
    const sae = index.saes[state.sae];
    const all = sae.max.map((_, i) => i);
    if (state.query.trim()) {
      const ids = matching(state.query);
      const scores = all.map((i) => score(sae, i, ids));
      state.order = all.filter((i) => scores[i] > 0).sort((a, b) => scores[b] - scores[a] || a - b);
    } else {
      const keys = { frequency: (i) => -sae.frequency[i], rarest: (i) => sae.frequency[i] || Infinity, max: (i) => -sae.max[i], twin: (i) => -sae.cosine[i], index: (i) => i };
      state.order = all.sort((a, b) => keys[state.sort](a) - keys[state.sort](b) || a - b);
    }
    state.shown = 100;
  }

  function row(i, tabbable) {
    const sae = index.saes[state.sae];
    const tokens = make("span", { class: "tokens" });
    for (let at = 0; at < Math.min(6, sae.fires_on[i].length); at += 2) tokens.append(token(sae.fires_on[i][at]), " ");
    const current = i === state.latent;
    return make("li", {}, make("a", { href: `#${state.sae}-${i}`, "aria-current": current ? "true" : null, tabindex: tabbable ? "0" : "-1" },
      make("span", {}, String(i)), sae.frequency[i] ? tokens : make("span", { class: "about" }, "dead"),
      make("span", { class: "about" }, percent(sae.frequency[i]))));
  }

  function drawList() {
    const shown = state.order.slice(0, state.shown);
    const stop = shown.includes(state.latent) ? state.latent : shown[0];
    parts.list.replaceChildren(...shown.map((i) => row(i, i === stop)));
    parts.more.hidden = state.order.length <= state.shown;
    const what = state.query.trim() ? `${state.where === "raises" ? "raising" : "firing on"} “${state.query.trim()}”, strongest first` : "in all";
    const n = state.order.length;
    parts.count.textContent = n || !state.query.trim() ? `${n.toLocaleString("en")} ${n === 1 ? "latent" : "latents"} ${what}`
      : `No latent ${state.where === "raises" ? "raises" : "fires on"} “${state.query.trim()}”. A search is for single tokens: “import”, and not “import os”.`;
  }

  function moveInList(event) {
    const links = [...parts.list.querySelectorAll("a")];
    const at = links.indexOf(document.activeElement);
    const step = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -links.length, End: links.length }[event.key];
    if (at < 0 || !step) return;
    event.preventDefault();
    const next = links[Math.max(0, Math.min(links.length - 1, at + step))];
    links[at].tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }

  // One latent

  function histogram(counts, largest) {
    const most = Math.max(...counts, 1);
    const height = (n) => n ? 4 + 56 * Math.log1p(n) / Math.log1p(most) : 0;
    const bars = counts.map((n, i) => svg("rect", { x: i * 11 + 0.5, y: 62 - height(n), width: 10, height: height(n) }, svg("title", {}, document.createTextNode(`${n} tokens`))));
    const total = counts.reduce((a, b) => a + b, 0);
    return [
      svg("svg", { class: "histogram", viewBox: "0 0 220 63", preserveAspectRatio: "none", role: "img", "aria-label": `Histogram of ${total} positive activations from 0 to ${thousandths(largest)}` },
        ...bars, svg("line", { x1: 0, x2: 220, y1: 62.5, y2: 62.5 })),
      make("div", { class: "axis" }, make("span", {}, "0"), make("span", {}, "activation; heights: log of token counts"), make("span", {}, thousandths(largest))),
    ];
  }

  function nextTokens(pairs, widest) {
    return make("ul", { class: "next" }, ...pairs.map(([id, value]) => make("li", {}, token(id),
      make("span", { class: "number" }, (value > 0 ? "+" : "−") + Math.abs(value).toFixed(2)),
      make("span", { class: "bar", style: `width:${(100 * Math.abs(value) / widest).toFixed(1)}%` }))));
  }

  const unpack = (pairs) => {
    const values = new Map();
    for (let at = 0; at < pairs.length; at += 2) values.set(pairs[at], pairs[at + 1]);
    return values;
  };

  function contextLine(ids, start, end, peak, pairs, largest) {
    const values = unpack(pairs);
    return ids.slice(start, end).map((id, at) => {
      const value = values.get(at) || 0;
      const span = inText(id, value / largest, `${visible(index.tokens[id])}  ${thousandths(value)}`);
      if (start + at === peak) span.classList.add("peak");
      return span;
    });
  }

  function contextItem(context, text, largest, key, twin) {
    const [window, start, peak, end, own, twins] = context;
    const ids = text[window];
    const item = make("li", {}, make("p", { class: `text ${key}` }, who(key, state.latent), ...contextLine(ids, start, end, peak, own, largest)));
    if (state.twin) {
      item.append(make("p", { class: `text twin ${other(key)}` }, who(other(key), twin), ...contextLine(ids, start, end, peak, twins, largest)));
    }
    return item;
  }

  const who = (key, i) => make("span", { class: "who" }, state.twin ? `${label(key)} ${i}` : "");

  const fact = (name, value) => make("li", {}, `${name} `, make("strong", {}, value));
  const latentLink = (key, i) => make("a", { href: `#${key}-${i}` }, `${label(key)} ${i}`);

  function latentCard(key, i, latent, text) {
    const sae = index.saes[key];
    const twin = sae.twin[i];
    const head = [make("h3", { id: "explorer-latent" }, `${label(key)}, latent ${i}`)];
    const nearest = make("p", { class: "note" }, "Nearest in the other autoencoder: ", latentLink(other(key), twin), `, cosine similarity ${thousandths(sae.cosine[i])}.`);
    if (!sae.frequency[i]) return [...head, make("p", {}, "This latent is dead: it fires on none of the held-out tokens."), nearest];
    const shares = make("li", {}, "mostly on ");
    for (let at = 0; at < sae.fires_on[i].length; at += 2) {
      shares.append(at ? ", " : "", token(sae.fires_on[i][at]), ` ${sae.fires_on[i][at + 1]} %`);
    }
    const widest = Math.max(...latent.raises.concat(latent.lowers).map((pair) => Math.abs(pair[1])), 1e-9);
    const twinBox = make("input", { type: "checkbox", checked: state.twin, onchange: (event) => { state.twin = event.target.checked; fill(); } });
    const list = make("ul", { class: "contexts" });
    const fill = () => list.replaceChildren(...latent.contexts.map((context) => contextItem(context, text, sae.max[i], key, twin)));
    fill();
    return [...head,
      make("ul", { class: "facts" }, fact("fires on", `${percent(sae.frequency[i])} of tokens`), fact("largest activation", thousandths(sae.max[i])), sae.fires_on[i].length ? shares : ""),
      nearest, ...histogram(latent.histogram, sae.max[i]),
      make("h4", {}, "Top contexts"),
      make("label", { class: "twin-choice" }, twinBox, ` with the same text under the nearest latent of ${label(other(key))}`), list,
      make("h4", {}, "Next tokens, by the direct path"),
      make("div", { class: "pair" },
        make("div", {}, make("p", { class: "note" }, "raised (change of the logit)"), nextTokens(latent.raises, widest)),
        make("div", { class: "lowered" }, make("p", { class: "note" }, "lowered"), nextTokens(latent.lowers, widest)))];
  }

  async function drawLatent() {
    const { sae, latent } = state;
    place.dataset.sae = sae;
    parts.card.className = `card-box ${sae}`;
    parts.card.setAttribute("aria-busy", "true");
    try {
      const [data, text] = await Promise.all([latentOf(sae, latent), load("text")]);
      if (sae !== state.sae || latent !== state.latent) return;
      parts.card.replaceChildren(...latentCard(sae, latent, data, text));
      parts.live.textContent = `${label(sae)}, latent ${latent}`;
    } catch (error) {
      parts.card.replaceChildren(make("p", { role: "alert" }, `This latent could not be shown: ${error.message}.`));
    }
    parts.card.removeAttribute("aria-busy");
  }

  function choose(sae, latent, { fromHash = false } = {}) {
    const moved = sae !== state.sae;
    Object.assign(state, { sae, latent });
    if (moved) {
      parts.saes.querySelector(`[value="${sae}"]`).checked = true;
      arrange();
    }
    while (state.order.indexOf(latent) >= state.shown) state.shown += 100;
    const within = parts.list.contains(document.activeElement);
    drawList();
    const current = parts.list.querySelector("[aria-current]");
    if (current) {
      const box = parts.box, top = current.offsetTop;
      if (top < box.scrollTop || top + current.offsetHeight > box.scrollTop + box.clientHeight) box.scrollTop = top - box.clientHeight / 3;
      if (within) current.focus({ preventScroll: true });
    }
    if (!fromHash) history.pushState(null, "", `#${sae}-${latent}`);
    return drawLatent();
  }

  const neighbour = (step) => {
    if (!state.order.length) return;
    const at = state.order.indexOf(state.latent);
    choose(state.sae, state.order[at < 0 ? 0 : (at + step + state.order.length) % state.order.length]);
  };

  function random() {
    const alive = state.order.filter((i) => index.saes[state.sae].frequency[i]);
    if (alive.length) choose(state.sae, alive[Math.floor(Math.random() * alive.length)]);
  }

  function rearrange() {
    arrange();
    drawList();
    parts.box.scrollTop = 0;
  }

  function radios(name, legend, entries, checked, onchange) {
    return make("fieldset", {}, make("legend", {}, legend), make("div", { class: "choice" }, ...entries.map(([value, text]) =>
      make("label", {}, make("input", { type: "radio", name, value, checked: value === checked, onchange: (event) => onchange(event.target.value) }), text))));
  }

  const select = (id, text, entries, onchange) => make("div", {}, make("label", { for: id }, text),
    make("select", { id, onchange: (event) => onchange(event.target.value) }, ...entries.map(([value, name]) => make("option", { value }, name))));

  function drawLatents() {
    parts.saes = radios("explorer-sae", "Autoencoder", Object.keys(index.saes).map((key) => [key, label(key)]), state.sae, (key) => {
      const twin = index.saes[state.sae].twin[state.latent];
      choose(key, twin);
    });
    const search = make("input", { type: "search", id: "explorer-search", autocomplete: "off", spellcheck: "false", placeholder: "a token: def, self, (",
      oninput: (event) => { state.query = event.target.value; rearrange(); },
      onkeydown: (event) => { if (event.key === "Enter" && state.order.length) choose(state.sae, state.order[0]); } });
    const sorts = [["frequency", "most frequent first"], ["rarest", "rarest first"], ["max", "largest activation first"], ["twin", "nearest twin first"], ["index", "by number"]];
    parts.count = make("p", { class: "note", role: "status" });
    parts.list = make("ul", { class: "list", onkeydown: moveInList });
    parts.more = make("button", { type: "button", class: "more", onclick: () => { state.shown += 100; drawList(); } }, "Show more");
    parts.box = make("div", { class: "list-box", role: "group", "aria-label": "Latents" }, parts.list, parts.more);
    parts.card = make("div", { class: "card-box" });
    parts.live = make("p", { class: "visually-hidden", role: "status" });
    return [
      make("div", { class: "book-controls" }, parts.saes,
        make("div", {}, make("label", { for: "explorer-search" }, "Find a token"), search),
        select("explorer-where", "among those that latents", [["fires_on", "fire on"], ["raises", "raise"]], (value) => { state.where = value; rearrange(); }),
        select("explorer-sort", "Sort", sorts, (value) => { state.sort = value; rearrange(); }),
        make("button", { type: "button", onclick: () => neighbour(-1) }, "Previous"),
        make("button", { type: "button", onclick: () => neighbour(1) }, "Next"),
        make("button", { type: "button", onclick: random }, "Random")),
      parts.count, make("div", { class: "columns" }, parts.box, parts.card), parts.live,
    ];
  }

  // Programs

  const MEASURES = {
    factor: { name: "missing scale", show: (v) => `× ${(v / 1000).toFixed(2)}`, share: (v) => (v - 1000) / 300, scale: ["× 1.0", "× 1.3"] },
    size: { name: "size", show: (v) => (v / 1000).toFixed(2), share: (v) => (1000 - v) / 600, scale: ["1.0", "0.4"] },
    error: { name: "error", show: (v) => (v / 1000).toFixed(2), share: (v) => v / 800, scale: ["0", "0.8"] },
    l0: { name: "active latents", show: String, share: (v) => v / 64, scale: ["0", "64"] },
    sum: { name: "sum of latents", show: thousandths, share: (v) => v / 5000, scale: ["0", "5"] },
  };
  const program = { number: 0, measure: "factor", token: 0, data: null };
  const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;

  function programText(key) {
    const measure = MEASURES[program.measure], values = program.data[key][program.measure];
    const spans = program.data.tokens.map((id, at) => inText(id, measure.share(values[at]), `${visible(index.tokens[id])}  ${measure.name} ${measure.show(values[at])}`,
      { role: "option", "data-at": at, tabindex: at === program.token ? "0" : "-1", "aria-selected": String(at === program.token),
        "aria-label": `${visible(index.tokens[id])}, ${measure.name} ${measure.show(values[at])}` }));
    const average = MEASURES[program.measure].show(program.measure === "l0" ? Math.round(mean(values)) : mean(values));
    return make("div", { class: `program ${key}` },
      make("p", { class: "name" }, make("strong", {}, label(key)), ` · mean ${measure.name} `, make("strong", {}, average), " ",
        make("span", { class: "legend note" }, `tint: ${measure.scale[0]}`, make("i", {}), measure.scale[1])),
      make("div", { class: "text", role: "listbox", "aria-label": `Tokens under ${label(key)}`, "aria-orientation": "horizontal", onclick: pickToken, onkeydown: moveToken }, ...spans));
  }

  function setToken(at, focusIn) {
    program.token = Math.max(0, Math.min(program.data.tokens.length - 1, at));
    for (const span of parts.programs.querySelectorAll("[data-at]")) {
      const chosen = Number(span.dataset.at) === program.token;
      span.setAttribute("aria-selected", String(chosen));
      span.tabIndex = chosen ? 0 : -1;
      if (chosen && focusIn && focusIn.contains(span)) span.focus();
    }
    drawToken();
  }

  function pickToken(event) {
    const span = event.target.closest("[data-at]");
    if (span) setToken(Number(span.dataset.at), event.currentTarget);
  }

  function moveToken(event) {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -1e6, End: 1e6 }[event.key];
    if (!step) return;
    event.preventDefault();
    setToken(program.token + step, event.currentTarget);
  }

  function activeList(key, at, widest) {
    const pairs = program.data[key].active[at];
    const items = [];
    for (let i = 0; i < Math.min(pairs.length, 24); i += 2) {
      const id = pairs[i], tokens = index.saes[key].fires_on[id];
      items.push(make("li", {}, make("a", { href: `#${key}-${id}`, "aria-label": `${label(key)} latent ${id}` }, String(id)), tokens.length ? token(tokens[0]) : make("span"),
        make("span", { class: "number" }, thousandths(pairs[i + 1])), make("span", { class: "bar", style: `width:${(100 * pairs[i + 1] / widest).toFixed(1)}%` })));
    }
    const hidden = pairs.length / 2 - items.length;
    return make("div", { class: key }, make("h4", {}, `${label(key)}: the latents that fire most`), make("ul", { class: "active" }, ...items),
      hidden > 0 ? make("p", { class: "note" }, `and ${hidden} more`) : "");
  }

  function drawToken() {
    const at = program.token, keys = Object.keys(index.saes);
    const widest = Math.max(...keys.map((key) => program.data[key].active[at][1] || 0), 1);
    const rows = Object.entries(MEASURES).map(([name, measure]) => make("tr", {}, make("th", { scope: "row" }, measure.name),
      ...keys.map((key) => make("td", {}, measure.show(program.data[key][name][at])))));
    parts.token.replaceChildren(
      make("h3", {}, "Token ", token(program.data.tokens[at]), ` (number ${at + 1})`),
      make("table", { class: "measures" }, make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "measure"), ...keys.map((key) => make("th", { scope: "col" }, label(key))))), make("tbody", {}, ...rows)),
      make("div", { class: "pair" }, ...keys.map((key) => activeList(key, at, widest))));
  }

  async function drawProgram() {
    const number = program.number;
    try {
      const data = await load(`program-${number}`);
      if (number !== program.number) return;
      program.data = data;
    } catch (error) {
      parts.programs.replaceChildren(make("p", { role: "alert" }, `This program could not be shown: ${error.message}.`));
      return;
    }
    program.token = Math.min(program.token, program.data.tokens.length - 1);
    parts.programs.replaceChildren(...Object.keys(index.saes).map(programText));
    drawToken();
  }

  function drawPrograms() {
    parts.programs = make("div", { class: "programs" });
    parts.token = make("div", {});
    return [
      make("p", {}, "The same tokens under both autoencoders, tinted by the measure below. Choose a token to see its latents: a click, or the arrow keys."),
      make("div", { class: "book-controls" },
        select("explorer-program", "Program", index.programs.map((title, i) => [i, title]), (value) => { program.number = Number(value); program.token = 0; drawProgram(); }),
        select("explorer-measure", "Measure", Object.entries(MEASURES).map(([key, measure]) => [key, measure.name]), (value) => { program.measure = value; drawProgram(); })),
      parts.programs, parts.token,
    ];
  }

  // Start

  /* A latent to begin with: common enough, on a word, and with the nearest twin. */
  function showpiece() {
    const sae = index.saes.topk;
    const common = state.order.filter((i) => sae.frequency[i] > 2000 && sae.frequency[i] < 30000
      && sae.fires_on[i][1] >= 50 && /[a-z]{3}/.test(index.tokens[sae.fires_on[i][0]]));
    return (common.length ? common : state.order).reduce((best, i) => sae.cosine[i] > sae.cosine[best] ? i : best);
  }

  async function start() {
    try {
      index = await load("index");
    } catch (error) {
      place.append(make("p", { role: "alert" }, `The explorer's data are missing: ${error.message}.`));
      return;
    }
    place.querySelector("[data-part=latents]").append(...drawLatents());
    place.querySelector("[data-part=programs]").append(...drawPrograms());
    arrange();
    const wanted = readHash();
    const chosen = wanted || { sae: "topk", latent: showpiece() };
    state.sae = "";
    const drawn = choose(chosen.sae, chosen.latent, { fromHash: true });
    window.addEventListener("hashchange", () => {
      const next = readHash() || (location.hash ? null : chosen);  // back to before the first choice
      if (!next) return;
      choose(next.sae, next.latent, { fromHash: true });
      const top = parts.card.getBoundingClientRect();
      if (top.top < 0 || top.top > window.innerHeight * 0.8) document.getElementById("explorer-latents").scrollIntoView();
    });
    await Promise.all([drawn, drawProgram()]);
    place.dataset.ready = "true";
    if (wanted) document.getElementById("explorer-latents").scrollIntoView();
  }

  start();
})();
