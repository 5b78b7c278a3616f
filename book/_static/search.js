/* What the search shows of a page: its text, without the contents that stand there for print, and formulas without their marks. */
document.addEventListener("DOMContentLoaded", () => {
  const { htmlToText } = Search;
  Search.htmlToText = (html, anchor) => {
    const page = new DOMParser().parseFromString(html, "text/html");
    page.getElementById("jb-print-docs-body")?.remove();
    for (const formula of page.querySelectorAll(".math")) formula.textContent = formula.textContent.replace(/\\[()[\]]/g, "");
    return htmlToText(page.documentElement.outerHTML, anchor);
  };
});
