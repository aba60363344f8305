// Search, choose and sort the rows that travel with the page.
const explorer = document.getElementById("explorer");
const PAGE = 24;
const explored = { bar: null, limit: PAGE, descending: false };
const control = (id) => document.getElementById(id);

const searchable = data.rows.map((row) =>
  [row.caption, row.url, row.key, row.value, row.step, row.reason, row.twin].join("\n").toLowerCase());

const outcomeIs = (row, wanted) => {
  if (!wanted) return true;
  if (wanted === "kept") return isKept(row);
  if (wanted === "dropped") return !isKept(row);
  const [kind, name] = [wanted.slice(0, wanted.indexOf(":")), wanted.slice(wanted.indexOf(":") + 1)];
  return kind === "split" ? row.split === name : !isKept(row) && row.step === name;
};

const inBar = (row, bar) => row.bins[bar.drawn] === bar.bin;

const matching = () => {
  const words = control("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const outcome = control("outcome").value;
  const language = control("language").value;
  return data.rows.filter((row, place) =>
    words.every((word) => searchable[place].includes(word)) &&
    outcomeIs(row, outcome) &&
    (!language || row.language === language) &&
    (!explored.bar || inBar(row, explored.bar)));
};

// What a row is sorted by: a number of its own, one of the distributions', or text. What has none comes last.
const sortValue = (row, by) => (by.startsWith("drawn:") ? row.values[+by.slice(6)] : row[by]) ?? null;
const sorted = (rows, by, descending) => {
  const compare = (a, b) => (typeof a === "number" ? a - b : a < b ? -1 : a > b ? 1 : 0);
  return [...rows].sort((one, other) => {
    const [a, b] = [sortValue(one, by), sortValue(other, by)];
    if (a === null || b === null) return (a === null) - (b === null) || one.row - other.row;
    return (descending ? -compare(a, b) : compare(a, b)) || one.row - other.row;
  });
};

const refresh = () => {
  const found = matching();
  const by = control("order").value;
  const note = (row) => (by.startsWith("drawn:") ? brief(sortValue(row, by)) : "");
  const shown = sorted(found, by, explored.descending).slice(0, explored.limit);
  control("cards").replaceChildren(...shown.map((row) => cardOf(row, note(row))));
  control("matching").textContent =
    `${number(shown.length)} shown of ${number(found.length)} that match, of ${number(data.rows.length)} here; the dataset has ${number(data.total)} rows.`;
  control("more").hidden = found.length <= shown.length;
  const bar = explored.bar;
  control("bar").hidden = !bar;
  if (bar) control("bar").textContent = `${data.drawn[bar.drawn].title}: ${barRange(bar)} ✕`;
};

const barRange = ({ drawn, bin }) => {
  const edges = data.drawn[drawn].edges;
  return bin === edges.length - 2 ? `from ${brief(edges[bin])}` : `${brief(edges[bin])}–${brief(edges[bin + 1])}`;
};

const explore = (change) => {
  Object.assign(explored, { limit: PAGE }, change);
  refresh();
};

const option = (value, text) => element("option", { value, textContent: text });

if (explorer && data.rows.length) {
  explorer.hidden = false;
  control("outcome").append(
    ...data.splits.map((split) => option(`split:${split}`, `kept: ${split}`)),
    ...data.steps.map((step) => option(`step:${step}`, `dropped: ${step}`)));
  control("order").append(...data.drawn.map((drawn, place) => option(`drawn:${place}`, drawn.title)));
  const languages = [...new Set(data.rows.map((row) => row.language).filter(Boolean))].sort();
  control("of-language").hidden = !languages.length;
  control("language").append(...languages.map((language) => option(language, language)));
  for (const id of ["search", "outcome", "language", "order"]) control(id).addEventListener("input", () => explore({}));
  control("turn").addEventListener("click", (event) => {
    explore({ descending: !explored.descending });
    event.currentTarget.setAttribute("aria-pressed", String(explored.descending));
  });
  control("bar").addEventListener("click", () => explore({ bar: null }));
  control("more").addEventListener("click", () => explore({ limit: explored.limit + PAGE }));
  refresh();
}

// The page's own search field finds rows as well.
find?.addEventListener("input", () => {
  control("search").value = find.value;
  explore({});
});
