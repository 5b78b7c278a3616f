/* A filter above each scoreboard: by verdict, and by words. Without JavaScript the table is simply whole. */
(function () {
  "use strict";

  const { make } = window.saelibDom;
  const KINDS = [["all", "all"], ["held", "✓ held"], ["held-in-part", "◐ held in part"], ["not-held", "✗ not held"]];

  function addFilter(table, number) {
    const rows = [...table.tBodies[0].rows];
    const is = (row, kind) => kind === "all" || row.querySelector(".verdict-badge")?.classList.contains(kind);
    const state = { kind: "all", words: "" };
    const count = make("p", { class: "scoreboard-count", role: "status" });
    const show = () => {
      const words = state.words.toLowerCase().split(/\s+/).filter(Boolean);
      const seen = rows.filter((row) => {
        const text = row.textContent.toLowerCase();
        const wanted = is(row, state.kind) && words.every((word) => text.includes(word));
        row.hidden = !wanted;
        return wanted;
      });
      count.textContent = `${seen.length} of ${rows.length} claims`;
    };
    const kinds = KINDS.map(([kind, text]) => make("label", {},
      make("input", { type: "radio", name: `scoreboard-${number}`, value: kind, checked: kind === "all",
        onchange: () => { state.kind = kind; show(); } }), `${text} (${rows.filter((row) => is(row, kind)).length})`));
    const search = make("input", { type: "search", id: `scoreboard-words-${number}`, placeholder: "words in a claim",
      oninput: (event) => { state.words = event.target.value; show(); } });
    const box = make("div", { class: "book-controls scoreboard-filter" },
      make("fieldset", {}, make("legend", { class: "visually-hidden" }, "Verdict"), make("div", { class: "choice" }, ...kinds)),
      make("label", { class: "visually-hidden", for: search.id }, "Words in a claim"), search, count);
    (table.closest(".pst-scrollable-table-container") || table).before(box);
    show();
  }

  document.querySelectorAll("table.scoreboard").forEach(addFilter);
})();
