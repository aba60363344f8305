// Histograms: a bar shows its rows; a slider tells what another threshold would change.

// Rows that pass a threshold at edge `at` lie in whole bins, so these counts are exact; see curate/report/thresholds.py.
const effect = (cut, at) => {
  const above = cut.operator.startsWith(">");
  const count = (bins, passing) =>
    bins.reduce((sum, amount, bin) => sum + ((bin > at) === (passing === above) ? amount : 0), 0);
  return { lost: count(cut.kept, false), gained: count(cut.dropped, true) };
};

const tell = (cut, at) => {
  if (at === cut.at) return "This is the threshold that was used.";
  const { lost, gained } = effect(cut, at);
  const kept = cut.kept.length && cut.kept.some(Boolean);
  const losing = kept ? `${number(lost)} of the rows that are kept would not pass this step. ` : "";
  return `${losing}${number(gained)} that it dropped would pass it, and go on to the later steps.`;
};

const svgElement = (tag, attributes) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
};

const slide = (card, drawn, cut, box) => {
  const [slider, said, value] = [box.querySelector("input"), box.querySelector("p"), box.querySelector("output")];
  const plot = card.querySelector("svg.plot");
  const line = plot && svgElement("line", { class: "cut moved", y1: data.plot.top, y2: data.plot.bottom, visibility: "hidden" });
  if (line) plot.append(line);
  const move = () => {
    const at = +slider.value;
    value.textContent = brief(cut.edges[at]);
    slider.setAttribute("aria-valuetext", value.textContent);
    said.textContent = tell(cut, at);
    if (!line) return;
    const [low, high] = [drawn.edges[0], drawn.edges[drawn.edges.length - 1]];
    const share = (cut.edges[at] - low) / (high - low);
    const x = data.plot.left + (data.plot.right - data.plot.left) * share;
    line.setAttribute("x1", x);
    line.setAttribute("x2", x);
    line.setAttribute("visibility", share < 0 || share > 1 || at === cut.at ? "hidden" : "visible");
  };
  slider.addEventListener("input", move);
  box.hidden = false;
  move();
};

const pick = (card, place, bin) => {
  const drawn = data.drawn[place];
  const bar = { drawn: place, bin };
  const rows = sorted(data.rows.filter((row) => inBar(row, bar)), `drawn:${place}`, false);
  const all = element("button", { type: "button", textContent: "Sort and search these" });
  all.addEventListener("click", () => {
    explore({ bar });
    document.getElementById("rows").scrollIntoView();
    control("search").focus({ preventScroll: true });
  });
  const total = drawn.kept[bin] + drawn.dropped[bin];
  const last = bin === drawn.edges.length - 2;
  const query = `SELECT * FROM rows WHERE (${data.judged}) AND ${drawn.expression} >= ${drawn.edges[bin]}` +
    (last ? "" : ` AND ${drawn.expression} < ${drawn.edges[bin + 1]}`);
  const box = card.querySelector(".picked");
  box.replaceChildren(
    element("p", { className: "note" }, element("b", { textContent: `${barRange(bar)}: ` }),
      `${number(Math.min(rows.length, 12))} of ${number(total)} rows (${number(drawn.kept[bin])} kept, ${number(drawn.dropped[bin])} dropped). `, all),
    element("div", { className: "grid" }, ...rows.slice(0, 12).map((row) => cardOf(row, brief(row.values[place])))),
    element("pre", { textContent: query }));
  box.hidden = false;
  for (const other of card.querySelectorAll(".bin")) other.setAttribute("aria-pressed", String(+other.dataset.bin === bin));
};

// One bar of a chart can be reached with the tab key; the arrow keys go on from there.
const KEYS = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
const listen = (card, place) => {
  const bars = [...card.querySelectorAll(".bin")];
  bars.forEach((bar, at) => {
    bar.setAttribute("role", "button");
    bar.setAttribute("aria-pressed", "false");
    bar.setAttribute("tabindex", at ? "-1" : "0");
    bar.addEventListener("click", () => pick(card, place, at));
    bar.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") pick(card, place, at);
      else if (event.key in KEYS) {
        const next = bars[Math.max(0, Math.min(bars.length - 1, at + KEYS[event.key]))];
        bar.setAttribute("tabindex", "-1");
        next.setAttribute("tabindex", "0");
        next.focus();
      } else return;
      event.preventDefault();
    });
  });
};

for (const card of document.querySelectorAll(".drawn")) {
  const place = +card.dataset.drawn;
  const drawn = data.drawn[place];
  if (!drawn) continue;
  listen(card, place);
  for (const box of card.querySelectorAll(".what-if")) slide(card, drawn, drawn.what_if[+box.dataset.cut], box);
}
document.querySelectorAll(".scripted").forEach((node) => { node.hidden = false; });
