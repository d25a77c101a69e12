// What was chosen, and what is shown of it.

const state = { quantity: PAGE.quantities[0], mode: null, R: null, layer: "", query: "" };
const files = PAGE.files.map((file) => ({
  ...file,
  rows: file.rows.map((values) =>
    Object.fromEntries(file.columns.map((key, i) => [key, values[i]])),
  ),
}));
const layers = [...new Set(files.flatMap((file) => file.rows.map((row) => row.at)))];
const modes = [
  ...new Set(files.filter((file) => file.modes.length > 1).flatMap((file) => file.modes)),
];
const values = new Map(); // singular values of a spectrum, made when they are first asked for

// Return the rows of a report in the chosen mode, with the numbers of the chosen R.
function rowsOf(file) {
  const rows =
    file.modes.length > 1 ? file.rows.filter((row) => row.mode === state.mode) : file.rows;
  return rows.map((row) => withR(file, row));
}

function withR(file, row) {
  const changes =
    file.inspection &&
    file.slider &&
    row.mode === "variance" &&
    state.R !== null &&
    Math.abs(row.R - state.R) > 1e-9;
  if (!changes || row.spectrum === null || row.spectrum === undefined) return row;
  const stored = file.spectra[row.spectrum];
  if (!values.has(stored)) values.set(stored, singularValues(stored));
  const cut = cutAt(values.get(stored), state.R);
  // What only the weights can tell is unknown.
  return {
    ...row,
    R: state.R,
    ...cut,
    k_share: cut.k / stored.rank,
    gap: null,
    edit_norm: null,
    rel_edit: null,
    realised: null,
    reason: "interpolated",
  };
}

// -- everything -----------------------------------------------------------------------------------

function show() {
  const shownRows = files.map((file) =>
    rowsOf(file).map((row) => (files.length > 1 ? { file: file.label, ...row } : { ...row })),
  );
  drawn = shownRows.flat();
  drawn.forEach((row, number) =>
    Object.defineProperty(row, "number", { value: number, configurable: true }),
  );
  showTable(drawn, state.query, state.layer);
  byId("layer").value = state.layer;
  showThreshold();
  const quantity = state.quantity;
  if (!quantity) return Promise.resolve();
  byId("meaning").textContent = quantity.meaning;
  const marks = shownRows.map((rows) => marksOf(rows, quantity));
  const axis = ends(marks.flat(), quantity, true);
  const colours = ends(
    marks.flat().filter((mark) => !mark.second),
    quantity,
    false,
  );
  const reports = document.querySelectorAll(".report");
  return Promise.all(
    files.flatMap((file, i) => [
      showDepth(reports[i], shownRows[i], marks[i], axis, colours),
      showSpectra(reports[i], file, shownRows[i]),
    ]),
  );
}

function showDepth(report, rows, marks, axis, colours) {
  const { quantity, layer: chosen } = state;
  const description = describe(marks, quantity);
  const [caption, lines, map] = ["depth-caption", "lines", "map"].map((name) =>
    report.querySelector(`.${name}`),
  );
  caption.textContent = description;
  lines.hidden = map.hidden = !marks.length;
  if (!marks.length) return Promise.resolve();
  const second = quantity.with_key
    ? ` ${quantity.with_label} is dashed and hollow; the map shows ${quantity.label}.`
    : "";
  caption.textContent += `${second} The colours of the map span the values that there are.`;
  const filled = new Set(marks.map((mark) => mark.at));
  const columns = [...new Set(rows.map((row) => row.at))]
    .filter((at) => filled.has(at))
    .map((at) => ({ at }));
  const cells = marks.filter((mark) => !mark.second);
  const height = ROW_HEIGHT * new Set(cells.map((mark) => mark.kind)).size;
  const scale = quantity.logarithmic ? "log" : "linear";
  return Promise.all([
    draw(
      lines,
      `lines-${scale}`,
      { columns, rows: marks },
      { ...axis, chosen },
      `Lines by layer. ${description}`,
      { onClick: choose },
    ),
    draw(
      map,
      `map-${scale}`,
      { columns, cells },
      { ...colours, chosen },
      `Map of layers and projections. ${description}`,
      { height, onClick: choose },
    ),
  ]);
}

function showSpectra(report, file, rows) {
  const place = report.querySelector(".spectra");
  if (!place) return Promise.resolve();
  const inside = filtered(rows, "", state.layer);
  const { curves, cuts } = curvesOf(file, inside, state.layer);
  const of = state.layer ? `of layer ${state.layer}` : "by projection (medians)";
  const mode = state.mode ? ` of ${state.mode}` : "";
  const caption = `Singular values ${of}; a diamond stands at the cut k${mode}.`;
  report.querySelector(".spectra-caption").textContent = caption;
  place.hidden = !curves.length;
  return place.hidden ? Promise.resolve() : draw(place, "spectra", { curves, cuts }, {}, caption);
}

function choose(layer) {
  state.layer = state.layer === layer ? "" : layer;
  refresh();
}

// -- controls -------------------------------------------------------------------------------------

function radios(place, name, labels, chosen, choose) {
  labels.forEach((label, i) => {
    const input = element("input", {
      type: "radio",
      name,
      value: String(i),
      checked: i === chosen,
    });
    input.addEventListener("change", () => choose(i));
    place.append(element("label", {}, input, ` ${label}`));
  });
}

function showThreshold() {
  const first = files.find((file) => file.slider);
  if (!first) return;
  const recorded = first.rows.find((row) => row.mode === "variance")?.R ?? 0.8;
  byId("R").value = state.R ?? recorded;
  const R = shown(state.R ?? recorded);
  byId("R-value").textContent = R;
  byId("R").setAttribute("aria-valuetext", R);
  byId("R-reset").disabled = state.R === null;
  byId("R-note").textContent = state.R === null ? AS_INSPECTED : interpolated();
}

const AS_INSPECTED =
  "As inspected. Move it, and k, P_k, ρ and λ are computed here, from the stored singular values.";

function interpolated() {
  const few = files.some((file) => file.slider && file.spectra.some((s) => !s.leading.length));
  const why = few ? " (few: an older version inspected; inspect again, and it will be closer)" : "";
  return (
    `Computed here, interpolated between the stored singular values${why}. ` +
    "What rounding leaves of the edit is unknown at this R."
  );
}

function setUpThreshold() {
  byId("threshold").hidden = !files.some((file) => file.slider && file.modes.includes("variance"));
  byId("R").addEventListener("input", (event) => {
    state.R = Number(event.target.value);
    chooseMode(modes.indexOf("variance"));
  });
  byId("R-reset").addEventListener("click", () => {
    state.R = null;
    refresh();
  });
}

function chooseMode(number) {
  if (number >= 0) state.mode = modes[number];
  const input = byId("modes").querySelector(`input[value="${number}"]`);
  if (input) input.checked = true;
  refresh();
}

function setUp() {
  const labels = PAGE.quantities.map((q) =>
    q.with_label ? `${q.label} and ${q.with_label}` : q.label,
  );
  radios(byId("quantities"), "quantity", labels, 0, (i) => {
    state.quantity = PAGE.quantities[i];
    refresh();
  });
  byId("quantities").hidden = !labels.length;
  state.mode = modes[0] ?? null;
  byId("modes").hidden = !modes.length;
  radios(byId("modes"), "mode", modes, 0, chooseMode);
  setUpThreshold();
  byId("layer").append(...layers.map((layer) => element("option", { value: layer }, layer)));
  byId("layer").addEventListener("change", (event) => {
    state.layer = event.target.value;
    refresh();
  });
  byId("query").addEventListener("input", (event) => {
    state.query = event.target.value;
    showTable(drawn, state.query, state.layer);
  });
  byId("clear").addEventListener("click", () => {
    Object.assign(state, { layer: "", query: "" });
    byId("query").value = "";
    refresh();
  });
  byId("more").addEventListener("click", () => {
    table.all = true;
    showTable(drawn, state.query, state.layer);
  });
  for (const form of document.forms)
    form.addEventListener("submit", (event) => event.preventDefault());
  makeHeaders(() => showTable(drawn, state.query, state.layer));
  darkness.addEventListener("change", refresh);
  addEventListener("resize", refresh); // the legends
}

// Show what is chosen now, once: what was chosen meanwhile is shown when the last is done.
let busy = null,
  again = false;
async function refresh() {
  if (busy) {
    again = true;
    return busy;
  }
  busy = (async () => {
    try {
      do {
        again = false;
        document.body.dataset.state = "drawing";
        await show();
      } while (again);
      document.body.dataset.state = "ready";
    } catch (error) {
      document.body.dataset.state = "failed";
      byId("failure").hidden = false;
      byId("failure").textContent =
        `The drawings could not be made (${error.message}). The table is complete.`;
      console.error(error);
    } finally {
      busy = null;
    }
  })();
  return busy;
}

setUp();
refresh();
