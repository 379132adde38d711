// MathJax sets what arithmatex has marked; on the page of a notebook, which has no marks, its dollars.
const notebook = document.querySelector(".jupyter-wrapper") !== null;
window.MathJax = {
  tex: {
    inlineMath: notebook ? [["$", "$"]] : [["\\(", "\\)"]],
    displayMath: notebook ? [["$$", "$$"]] : [["\\[", "\\]"]],
    processEscapes: true,
  },
  options: notebook
    ? { ignoreHtmlClass: "jp-InputArea|jp-OutputArea", processHtmlClass: "jp-RenderedMarkdown" }
    : { ignoreHtmlClass: ".*|", processHtmlClass: "arithmatex" },
};
