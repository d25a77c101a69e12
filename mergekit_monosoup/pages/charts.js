// The drawings: what they are given, and when they are made anew.

// Okabe & Ito's colours without yellow, two of them darker; and as bright ones for a dark ground.
const LIGHT = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B37400", "#2E8BC0", "#4d4d4d"];
const DARK = ["#56B4E9", "#FF8A4C", "#2FD3A5", "#E79AC6", "#E69F00", "#9CC9FF", "#c9d1d9"];
const ENTRY_WIDTH = 165; // of a legend
const ROW_HEIGHT = 18; // of a projection in the map
const MOST_SVG_MARKS = 1500; // each is an element of the page, with words for screen readers
const darkness = matchMedia("(prefers-color-scheme: dark)");

function theme() {
  const style = getComputedStyle(document.documentElement);
  const [text, grid, ground] = ["text", "line", "ground"].map((name) =>
    style.getPropertyValue(`--${name}`).trim(),
  );
  const words = {
    labelColor: text,
    titleColor: text,
    labelFont: "system-ui, sans-serif",
    titleFont: "system-ui, sans-serif",
    titleFontWeight: "normal",
  };
  return {
    background: ground,
    axis: { ...words, gridColor: grid, domainColor: grid, tickColor: grid },
    legend: words,
    view: { stroke: null },
    style: { "chosen-band": { fill: text }, "chosen-frame": { stroke: text } },
    range: { category: darkness.matches ? DARK : LIGHT },
  };
}

const made = new Map(); // what stands in a place: its specification, view, and how to take it away

// Draw, or give what stands there already new data and parameters.
async function draw(place, name, datasets, parameters, description, { height, onClick } = {}) {
  const marks = Object.values(datasets).reduce((sum, values) => sum + values.length, 0);
  const renderer = marks > MOST_SVG_MARKS ? "canvas" : "svg";
  const kind = `${name} ${renderer} ${darkness.matches} ${height}`;
  const before = made.get(place);
  parameters = { ...parameters, ...room(place.clientWidth) };
  if (before?.kind === kind) {
    for (const [key, value] of Object.entries(parameters)) before.view.signal(key, value);
    for (const [key, values] of Object.entries(datasets)) before.view.data(key, values);
    before.view.description(description);
    await before.view.runAsync();
    return;
  }
  made.delete(place);
  before?.finalize();
  const specification = PAGE.specifications[name];
  const params = (specification.params ?? []).map((p) => ({
    ...p,
    value: parameters[p.name] ?? p.value,
  }));
  const options = {
    mode: "vega-lite",
    ast: true,
    renderer,
    config: theme(),
    actions: { export: true, source: false, compiled: false, editor: false },
    tooltip: { formatTooltip: (datum) => tooltip(datum) },
  };
  const drawing = { ...specification, params, datasets, description };
  const result = await vegaEmbed(place, height ? { ...drawing, height } : drawing, options);
  if (onClick)
    result.view.addEventListener(
      "click",
      (_, item) => item?.datum?.at !== undefined && onClick(item.datum.at),
    );
  made.set(place, { kind, view: result.view, finalize: () => result.finalize() });
}

// Return what depends on the width of a drawing: columns of its legend, and room for names.
function room(width) {
  return {
    legend_columns: Math.max(1, Math.floor(width / ENTRY_WIDTH)),
    left: width < 450 ? 96 : 128,
  };
}

function tooltip(datum) {
  const content =
    datum.row === undefined
      ? element(
          "dl",
          {},
          element("dt", {}, datum.at ?? datum.kind),
          element("dd", {}, datum.says ?? ""),
        )
      : details(drawn[datum.row]);
  return content.outerHTML;
}

let drawn = []; // the rows that drawings are made of; their marks hold an index

// Return what a drawing by depth shows of some rows: a mark for each layer and projection, the mean
// of the rows that are there.
function marksOf(rows, quantity) {
  const parts = [[quantity.key, quantity.label, false]];
  if (quantity.with_key) parts.push([quantity.with_key, quantity.with_label, true]);
  const marks = new Map();
  for (const row of rows) {
    for (const [key, label, second] of parts) {
      const value = row[key];
      if (typeof value !== "number" || (quantity.logarithmic && value <= 0)) continue;
      const id = JSON.stringify([row.at, row.kind, key]);
      const mark = marks.get(id) ?? {
        at: row.at,
        kind: row.kind,
        part: label,
        second,
        row: row.number,
        values: [],
      };
      mark.values.push(value);
      marks.set(id, mark);
    }
  }
  return [...marks.values()].map(({ values, ...mark }) => {
    const value = values.reduce((a, b) => a + b, 0) / values.length;
    if (values.length === 1) return { ...mark, value };
    const [low, high] = [Math.min, Math.max].map((of) => shown(values.reduce((a, b) => of(a, b))));
    const spread = `mean ${shown(value)} of ${values.length} matrices, from ${low} to ${high}`;
    const says = `${mark.kind}, ${mark.part}: ${spread}`;
    return { ...mark, value, says, row: undefined };
  });
}

// Return the ends of a scale, the same for all reports: of an axis what the quantity is at least
// drawn to, with some room; of colours the values alone.
function ends(marks, quantity, isAxis) {
  const values = marks.map((mark) => mark.value);
  let low = values.reduce((a, b) => Math.min(a, b), isAxis ? (quantity.low ?? Infinity) : Infinity);
  let high = values.reduce(
    (a, b) => Math.max(a, b),
    isAxis ? (quantity.high ?? -Infinity) : -Infinity,
  );
  if (!values.length) return { low: quantity.logarithmic ? 0.1 : 0, high: 1 };
  if (low === high) [low, high] = low > 0 ? [low * 0.8, high * 1.25] : [low - 0.5, high + 0.5];
  if (!isAxis || high === quantity.high) return { low, high };
  return quantity.logarithmic
    ? { low: low * 0.8, high: high * 1.25 }
    : { low, high: high + 0.05 * (high - low) };
}

function describe(marks, quantity) {
  const first = marks.filter((mark) => !mark.second);
  if (!first.length) {
    const why = state.R === null ? "" : ", for only the weights can tell it at another R";
    return `${quantity.label}: no matrix has a value here${why}.`;
  }
  const where = (mark) => {
    const place = mark.at === mark.kind ? mark.kind : `layer ${mark.at}, ${mark.kind}`;
    return `${shown(mark.value)} (${place})`;
  };
  const lowest = first.reduce((a, b) => (b.value < a.value ? b : a));
  const highest = first.reduce((a, b) => (b.value > a.value ? b : a));
  const mean = first.reduce((sum, mark) => sum + mark.value, 0) / first.length;
  return `${quantity.label}: mean ${shown(mean)}, from ${where(lowest)} to ${where(highest)}.`;
}

// -- spectra --------------------------------------------------------------------------------------

// Return the curves of some matrices, or their medians by projection, and the cut of each curve.
function curvesOf(file, rows, layer) {
  const groups = new Map();
  for (const row of rows) {
    if (row.spectrum === undefined || row.spectrum === null) continue;
    const name = layer ? row.name : row.kind;
    const group = groups.get(name) ?? { name, kind: row.kind, curves: [], cuts: [] };
    group.curves.push(file.spectra[row.spectrum].spectrum);
    if (typeof row.k_share === "number") group.cuts.push(row.k_share);
    groups.set(name, group);
  }
  const curves = [],
    cuts = [];
  for (const { name, kind, curves: stored, cuts: places } of groups.values()) {
    const length = Math.min(...stored.map((curve) => curve.length));
    const curve = Array.from({ length }, (_, i) => median(stored.map((values) => values[i])));
    const points = curve
      .map((sigma, i) => ({ name, kind, place: length > 1 ? i / (length - 1) : 0, sigma }))
      .filter((point) => point.sigma > 0);
    curves.push(...points);
    if (!places.length || !points.length) continue;
    const place = median(places);
    cuts.push({
      kind,
      place,
      sigma: heightAt(points, place),
      says: `${name}: cut at ${shown(place)} of the rank`,
    });
  }
  return { curves, cuts };
}

function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

// Return the height of a curve on the straight line that a logarithmic axis draws.
function heightAt(points, place) {
  const above = points.findIndex((point) => point.place >= place);
  if (above <= 0) return points[above === 0 ? 0 : points.length - 1].sigma;
  const [a, b] = [points[above - 1], points[above]];
  return a.sigma * (b.sigma / a.sigma) ** ((place - a.place) / (b.place - a.place));
}
