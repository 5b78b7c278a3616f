/* Marks the boxes that scroll sideways at the edges behind which there is more; book.css fades those. And prints in light. */
(function () {
  "use strict";

  const BOXES = ".bd-article :is(a.image-reference, mjx-container[display], .pst-scrollable-table-container, .output pre, .rows)";

  function mark(box) {
    box.classList.toggle("more-left", box.scrollLeft > 1);
    box.classList.toggle("more-right", box.scrollLeft + box.clientWidth < box.scrollWidth - 1);
  }

  const markAll = () => document.querySelectorAll(BOXES).forEach(mark);

  for (const event of ["DOMContentLoaded", "load", "resize"]) window.addEventListener(event, markAll);
  document.addEventListener("toggle", markAll, true);  // details that open; neither event bubbles
  document.addEventListener("scroll", ({ target }) => { if (target.matches?.(BOXES)) mark(target); }, true);
  /* Paper is white, whatever the theme. */
  let theme;
  window.addEventListener("beforeprint", () => { theme = document.documentElement.dataset.theme; document.documentElement.dataset.theme = "light"; });
  window.addEventListener("afterprint", () => { document.documentElement.dataset.theme = theme; });
  window.addEventListener("load", () => window.MathJax?.startup?.promise.then(markAll));
})();
