// The rows that travel with the page, and how one of them is shown. All text goes in as text, never as markup.
const data = JSON.parse(document.getElementById("data")?.textContent ?? '{"rows":[],"drawn":[],"splits":[],"steps":[]}');
const shownPictures = new Map([...document.querySelectorAll("img[data-key]")].map((image) => [image.dataset.key, image.src]));

const element = (tag, properties = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
};
const number = (value) => value.toLocaleString("en-US");
const brief = (value) => (value === null || value === undefined ? "–" : String(+value.toPrecision(4)));
const isKept = (row) => row.split !== undefined;
const fate = (row) => (isKept(row) ? row.split : row.step ?? row.stage ?? "dropped");

// A picture that is thought unsafe stays blurred until its button is pressed.
const guard = (frame) => {
  if (!frame.querySelector("img")) return frame;
  const button = element("button", { type: "button", className: "reveal", textContent: "Show" });
  button.setAttribute("aria-label", "Show a picture that may be unsafe");
  button.addEventListener("click", () => {
    frame.classList.remove("unsafe");
    button.remove();
  });
  frame.append(button);
  return frame;
};
document.querySelectorAll(".frame.unsafe").forEach(guard);

const frameOf = (row) => {
  const source = row.picture ?? shownPictures.get(row.key);
  if (!source) return element("div", { className: "frame", textContent: "no picture" });
  const image = element("img", { src: source, alt: (row.caption ?? "").slice(0, 120), loading: "lazy" });
  const frame = element("div", { className: row.unsafe ? "frame unsafe" : "frame" }, image);
  return row.unsafe ? guard(frame) : frame;
};

const nameOf = (row) => {
  const name = element("bdi", { textContent: row.host ?? row.url?.slice(0, 80) ?? "no URL" });
  return row.link
    ? element("a", { href: row.url, target: "_blank", rel: "noopener noreferrer nofollow" }, name)
    : name;
};

// A row as a figure; `note` is what to say of it beside its fate, such as the value that it is sorted by.
const cardOf = (row, note = "") => {
  const why = [fate(row), isKept(row) ? "" : row.value].filter(Boolean).join(" · ");
  const text = element("figcaption", {},
    element("span", { className: isKept(row) ? "value stays" : "value", textContent: why }),
    element("bdi", { className: "text", textContent: row.caption ?? "(no caption)" }),
    element("span", { className: "meta" }, nameOf(row), ` · ${note || `row ${number(row.row)}`}`));
  const card = element("figure", {}, frameOf(row), text);
  card.title = row.key;
  return card;
};
