// Find: hides pictures and rows whose text does not hold the words. Without a script the page shows everything.
"use strict";
const find = document.getElementById("find");
if (find) {
  const items = [...document.querySelectorAll("[data-find]")].map((node) => [node, node.textContent.toLowerCase()]);
  const said = document.getElementById("found");
  find.closest("label").hidden = false;
  find.addEventListener("input", () => {
    const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const [node, text] of items) {
      node.hidden = !words.every((word) => text.includes(word));
      shown += node.hidden ? 0 : 1;
    }
    said.textContent = words.length ? `${shown} of ${items.length}` : "";
  });
}
// A link to a folded section opens it.
const open = () => {
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (target && target.tagName === "DETAILS") target.open = true;
};
addEventListener("hashchange", open);
open();
