// The map: a dot for each image that has a place; the one pointed at is shown.
const points = document.getElementById("points");
if (points) {
  const [width, height, margin] = [640, 420, 14];
  const placed = data.rows.filter((row) => row.xy).map((row) => ({
    row,
    x: margin + row.xy[0] * (width - 2 * margin),
    y: height - margin - row.xy[1] * (height - 2 * margin),
  }));
  for (const point of placed) {
    point.dot = svgElement("circle", { class: isKept(point.row) ? "kept" : "dropped", cx: point.x, cy: point.y, r: 4 });
    points.append(point.dot);
  }
  let current = null;
  const show = (point) => {
    if (!point || point === current) return;
    current?.dot.classList.remove("current");
    current = point;
    point.dot.classList.add("current");
    points.append(point.dot); // above the others
    document.getElementById("pointed").replaceChildren(cardOf(point.row));
  };
  const nearest = (cost) => {
    let [best, least] = [null, Infinity];
    for (const point of placed) {
      const amount = cost(point);
      if (amount < least) [best, least] = [point, amount];
    }
    return best;
  };
  const pointAt = (event) => {
    const box = points.getBoundingClientRect();
    const [x, y] = [((event.clientX - box.left) / box.width) * width, ((event.clientY - box.top) / box.height) * height];
    show(nearest((point) => (point.x - x) ** 2 + (point.y - y) ** 2));
  };
  points.addEventListener("pointermove", pointAt);
  points.addEventListener("pointerdown", pointAt);
  const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  points.addEventListener("keydown", (event) => {
    if (!(event.key in ARROWS)) return;
    event.preventDefault();
    const [dx, dy] = ARROWS[event.key];
    const from = current ?? { x: width / 2, y: height / 2 };
    // Ahead counts once, aside twice: the next one in about this direction.
    show(nearest((point) => {
      const ahead = (point.x - from.x) * dx + (point.y - from.y) * dy;
      const aside = Math.abs((point.x - from.x) * dy) + Math.abs((point.y - from.y) * dx);
      return point === current || ahead <= 0 ? Infinity : ahead + 2 * aside;
    }));
  });
}
