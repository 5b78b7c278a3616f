/* What the explorer, the frontier and the scoreboard's filter build their elements with. An attribute `onNAME` is a
   listener; one that is true has no value; one that is false or null is left out. */
window.saelibDom = (function () {
  "use strict";

  function build(element, attributes, children) {
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (value === true) element.setAttribute(name, "");
      else if (value !== false && value != null) element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
  }

  return {
    make: (tag, attributes = {}, ...children) => build(document.createElement(tag), attributes, children),
    svg: (tag, attributes = {}, ...children) => build(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children),
  };
})();
