"use strict";

// The search page quotes a page as text: here without what is there for printing only, and without the marks around formulas.
if (typeof Search !== "undefined") {
  const whole = Search.htmlToText;
  Search.htmlToText = (markup, anchor) => {
    const page = new DOMParser().parseFromString(markup, "text/html");
    page.querySelectorAll("#jb-print-docs-body, .cell_output svg").forEach((element) => element.remove());
    page.querySelectorAll(".math").forEach((formula) => {
      formula.textContent = formula.textContent.replace(/\\[()[\]]/g, "").replace(/\\(?:text|mathrm)\{([^{}]*)\}/g, "$1");
    });
    return whole(page.documentElement.outerHTML, anchor);
  };
}
