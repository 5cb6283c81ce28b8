// Chooses what Bokeh draws. State in, pictures out: everything that changes the view goes through show().
"use strict";

const kernelExplorer = (() => {
  const scene = JSON.parse(document.getElementById("scene").textContent);
  const PANELS = ["fc", "branches", "merged"];
  const MOST_MARKED = 8; // dashed squares a map; more would cover it
  const LEAST_RANGE = Math.E; // of colours on the logarithmic scale, so that a colour is wider than a stored step
  const byId = (id) => document.getElementById(id);
  let models; // name -> Bokeh's model
  let state = null; // layer (its number), set, row, column, scale, span
  let shown = null; // the numbers on the screen
  let drawnScale = null;
  let asked = 0; // how many times a view was asked for: a slower, older one must not cover the newest

  // ---- numbers: the reverse of codes.py

  const cache = new Map(); // id -> promise of Int16Array; a layer's worth and a few more
  function unpack(id) {
    if (!cache.has(id)) {
      if (cache.size > 64) cache.delete(cache.keys().next().value);
      cache.set(id, inflate(byId(id).textContent));
    }
    return cache.get(id);
  }

  async function inflate(text) {
    const packed = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    const planes = new Uint8Array(await new Response(stream).arrayBuffer());
    const count = planes.length / 2;
    const codes = new Int16Array(count);
    for (let i = 0; i < count; i++) codes[i] = planes[i] | (planes[count + i] << 8);
    return codes;
  }

  const restore = (code, base) => Math.sign(code) * (code && base * Math.exp(scene.step * (Math.abs(code) - 1)));

  // The kernel of a layer's set: weights(panel, output cell) -> Float64Array over the map; taps(output cell) -> cells.
  async function kernel(layer, set) {
    const [taps, codes] = await Promise.all([unpack(`numbers-${layer}-taps`), unpack(`numbers-${layer}-${set}`)]);
    const { size, sets } = scene.layers[layer];
    const cells = size[0] * size[1];
    const base = sets[set].base;
    const start = [0];
    for (let p = 0; p < cells; p++) start.push(start[p] + taps[p]);
    const seen = (p) => taps.subarray(cells + start[p], cells + start[p + 1]);
    const weights = (panel, p) => {
      const row = new Float64Array(cells);
      if (panel !== "branches") {
        for (let q = 0; q < cells; q++) row[q] = restore(codes[p * cells + q], base);
      }
      if (panel !== "fc") {
        const first = cells * cells + (panel === "merged" ? start[cells] : 0) + start[p];
        seen(p).forEach((q, i) => { row[q] = restore(codes[first + i], base); });
      }
      return row;
    };
    return { weights, seen };
  }

  // ---- what a row says

  const distance = (p, q, columns) =>
    Math.max(Math.abs(Math.floor(p / columns) - Math.floor(q / columns)), Math.abs((p % columns) - (q % columns)));

  // The share of |weight| within distance 0, 1, 2, ... of output cell p; weights of 0 alone give zeros.
  function profile(row, p, [rows, columns]) {
    const shares = new Array(Math.max(rows, columns)).fill(0);
    let total = 0;
    row.forEach((w, q) => { shares[distance(p, q, columns)] += Math.abs(w); total += Math.abs(w); });
    let sum = 0;
    return shares.map((share) => (total ? (sum += share) / total : 0));
  }

  // Cells that the branches do not see and that exceed the weakest, or the strongest, of those that they see.
  function exceeding(row, seen) {
    if (!seen.length) return { weakest: [], strongest: [], outside: row.length };
    const inside = new Set(seen);
    const values = Array.from(seen, (q) => Math.abs(row[q]));
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const cells = [...row.keys()].filter((q) => !inside.has(q) && Math.abs(row[q]) > low);
    cells.sort((a, b) => Math.abs(row[b]) - Math.abs(row[a]));
    return {
      weakest: cells, strongest: cells.filter((q) => Math.abs(row[q]) > high), outside: row.length - inside.size,
    };
  }

  // The borders between seen cells and others, as lines for Bokeh's multi_line.
  function outline(seen, [rows, columns]) {
    const inside = new Set(seen);
    const lines = { xs: [], ys: [] };
    for (const q of inside) {
      const [y, x] = [Math.floor(q / columns), q % columns];
      for (const [dy, dx] of [[-1, 0], [1, 0], [0, -1], [0, 1]]) {
        const onMap = y + dy >= 0 && y + dy < rows && x + dx >= 0 && x + dx < columns;
        if (onMap && inside.has((y + dy) * columns + x + dx)) continue;
        const [ax, ay] = [Math.abs(dy) / 2, Math.abs(dx) / 2];
        lines.xs.push([x + dx / 2 - ax, x + dx / 2 + ax]);
        lines.ys.push([y + dy / 2 - ay, y + dy / 2 + ay]);
      }
    }
    return lines;
  }

  // ---- words

  const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)}\u00a0%`;
  const number = (w) => (w > 0 ? "+" : "") + (w === 0 ? "0" : w.toPrecision(3));

  function place(q, p, columns) {
    const [y, x] = [Math.floor(q / columns), q % columns];
    const [dy, dx] = [y - Math.floor(p / columns), x - (p % columns)];
    const steps = [];
    if (dy) steps.push(`${Math.abs(dy)} ${dy < 0 ? "up" : "down"}`);
    if (dx) steps.push(`${Math.abs(dx)} ${dx < 0 ? "left" : "right"}`);
    return `row ${y}, column ${x} (${steps.join(", ") || "the point itself"})`;
  }

  // ---- pictures

  const source = (name, data) => { models(name).data = data; };
  const column = (cells, columns) => Array.from(cells, (q) => q % columns);
  const rowOf = (cells, columns) => Array.from(cells, (q) => Math.floor(q / columns));

  function drawMaps(layer, p) {
    const columns = layer.size[1];
    const { rows, seen } = shown;
    const inside = new Set(seen);
    const cells = [...rows.fc.keys()];
    const magnitudes = (panel) => cells.map((q) =>
      panel === "branches" && !inside.has(q) ? NaN : Math.abs(rows[panel][q]));
    source("cells", {
      x: column(cells, columns),
      y: rowOf(cells, columns),
      place: cells.map((q) => place(q, p, columns)),
      ...Object.fromEntries(PANELS.map((panel) => [panel, magnitudes(panel)])),
      ...Object.fromEntries(PANELS.map((panel) => [`${panel}_words`, cells.map((q) => valueText(panel, q))])),
    });
    source("outline", outline(seen, layer.size));
    source("point", { x: column([p], columns), y: rowOf([p], columns) });
    for (const panel of ["fc", "merged"]) {
      const { weakest, strongest } = shown.exceed[panel];
      const kinds = { strongest, weakest: weakest.slice(strongest.length).slice(0, MOST_MARKED) };
      for (const [kind, marked] of Object.entries(kinds)) {
        source(`exceed-${kind}-${panel}`, { x: column(marked, columns), y: rowOf(marked, columns) });
      }
    }
  }

  // Round numbers between low and high: 1, 2 and 5 of every power of ten, or the powers alone where they are many.
  function logTicks(low, high) {
    const first = Math.floor(Math.log10(low));
    const powers = Array.from({ length: Math.ceil(Math.log10(high)) - first + 1 }, (_, i) => 10 ** (first + i));
    const ticks = powers.length > 6 ? powers : powers.flatMap((power) => [power, 2 * power, 5 * power]);
    return ticks.filter((tick) => tick >= low && tick <= high);
  }

  // Some four steps of 1, 2 or 5 times a power of ten from 0 up to high.
  function linearTicks(high) {
    const power = 10 ** Math.floor(Math.log10(high / 2));
    const step = [1, 2, 5].map((times) => times * power).find((each) => high / each <= 6) ?? 10 * power;
    return Array.from({ length: Math.floor(high / step + 1e-9) + 1 }, (_, i) => i * step);
  }

  // One range of colours for the three maps: of the weights on them, or of the share-set's.
  function setColours(layer) {
    let low = layer.sets[state.set].base;
    let high = layer.sets[state.set].top;
    if (state.span === "point") {
      const all = PANELS.flatMap((panel) => Array.from(shown.rows[panel], Math.abs)).filter((w) => w > 0);
      if (all.length) [low, high] = [Math.min(...all), Math.max(...all)];
    }
    high = high || 1;
    if (state.scale === "log") {
      models("ticks-log").ticks = logTicks(Math.min(low, high / LEAST_RANGE), high);
      models("mapper-log").setv({ low: Math.min(low, high / LEAST_RANGE), high });
    } else {
      models("ticks-linear").ticks = linearTicks(high);
      models("mapper-linear").high = high;
    }
    if (drawnScale === state.scale) return; // Bokeh draws anew whatever is set, the same or not
    drawnScale = state.scale;
    for (const scale of ["log", "linear"]) models(`bar-${scale}`).visible = state.scale === scale;
    for (const panel of PANELS) {
      const colour = { field: panel, transform: models(`mapper-${state.scale}`) };
      models(`picture-${panel}`).glyph.setv({ fill_color: colour, line_color: colour });
    }
  }

  function setSize(layer) {
    const [rows, columns] = layer.size;
    for (const name of [...PANELS, "picker"]) {
      models(`columns-${name}`).setv({ start: -0.5, end: columns - 0.5 });
      models(`rows-${name}`).setv({ start: rows - 0.5, end: -0.5 });
      models(`map-${name}`).aspect_ratio = Math.min(Math.max(columns / rows, 1 / 4), 8); // a sequence is one row
    }
  }

  function drawProfile(name, lines) {
    const toPercent = (row) => row.map((share) => 100 * share);
    const r = lines.merged.map((_, i) => i);
    models(`distances-${name}`).setv({ start: -0.2, end: Math.max(r.length - 1, 1) + 0.2 });
    source(`profile-${name}`, {
      r, fc: toPercent(lines.fc), merged: toPercent(lines.merged), flat: toPercent(lines.flat),
    });
  }

  // Every output point, the darker the nearer its weight is.
  function drawPicker(layer, kernelNow) {
    const cells = layer.size[0] * layer.size[1];
    const near = Float64Array.from({ length: cells }, (_, p) =>
      profile(kernelNow.weights("merged", p), p, layer.size)[layer.reach]);
    const [least, most] = [near.reduce((a, b) => Math.min(a, b)), near.reduce((a, b) => Math.max(a, b))];
    models("mapper-near").setv({ low: Math.min(least, most - 1e-9), high: most });
    const [all, columns] = [[...near.keys()], layer.size[1]];
    source("near", { x: column(all, columns), y: rowOf(all, columns), near: [...near] });
    byId("caption-picker").textContent =
      `Share of the merged kernel's |weight| within distance ${layer.reach}: from ${percent(least)} (white) to ` +
      `${percent(most)} (black). Pass over it to look, click to stay.`;
  }

  function valueText(panel, q) {
    if (panel === "branches" && !shown.seen.includes(q)) return "no branch";
    return number(shown.rows[panel][q]);
  }

  function readCell(q) {
    for (const panel of PANELS) byId(`value-${panel}`).textContent = valueText(panel, q);
    const words = place(q, shown.p, scene.layers[state.layer].size[1]);
    for (const each of document.querySelectorAll(".cell")) each.textContent = words;
  }

  function write(layer, near) {
    const r = layer.reach;
    const { exceed } = shown;
    const flat = flatProfile(shown.p, layer.size)[r];
    byId("summary").textContent =
      `Output point in row ${Math.floor(shown.p / layer.size[1])}, column ${shown.p % layer.size[1]} of ` +
      `${layer.title}, ${layer.sets[state.set].label}: ${percent(near.merged[r])} of the merged kernel's |weight| ` +
      `lies within distance ${r}, ${percent(near.fc[r])} of the FC's alone; ` +
      `a kernel without locality would have ${percent(flat)} there.`;
    for (const panel of ["fc", "merged"]) {
      const { weakest, strongest, outside } = exceed[panel];
      const stronger = shown.seen.length
        ? ` Of ${outside} cells that the branches do not see, ${weakest.length} ` +
          `exceed${weakest.length === 1 ? "s" : ""} the weakest that they see, ${strongest.length} the strongest.`
        : "";
      byId(`caption-${panel}`).textContent = `${percent(near[panel][r])} of |weight| within distance ${r}.${stronger}`;
    }
    byId("caption-branches").textContent = layer.branches
      ? `${layer.branches}: ${shown.seen.length} cells, ${percent(near.branches[r])} of |weight| within distance ${r}.`
      : "This layer has no branches, or they were merged into the FC: nothing to draw, and both other maps agree.";
    byId("caption-profile-point").textContent = "How much of |weight| lies so near to the output point, or nearer.";
    byId("caption-profile-layer").textContent =
      `Mean over the points and ${layer.grouped ? "groups" : "share-sets"} of ${layer.title}.`;
    byId("caption-profile-net").textContent = "Mean over the layers of the net.";
  }

  const flatProfile = (p, size) => profile(new Float64Array(size[0] * size[1]).fill(1), p, size);

  // Draw a view; stay: false for a passing look, which changes neither the state nor the address.
  async function show(next, stay = true) {
    const turn = ++asked;
    const layer = scene.layers[next.layer];
    const kernelNow = await kernel(next.layer, next.set);
    if (turn !== asked) return;
    const before = state;
    const otherKernel = !before || before.layer !== next.layer || before.set !== next.set;
    state = stay || !before ? next : { ...before };
    const p = next.row * layer.size[1] + next.column;
    const rows = Object.fromEntries(PANELS.map((panel) => [panel, kernelNow.weights(panel, p)]));
    const seen = kernelNow.seen(p);
    shown = { p, rows, seen, exceed: { fc: exceeding(rows.fc, seen), merged: exceeding(rows.merged, seen) } };
    const near = Object.fromEntries(PANELS.map((panel) => [panel, profile(rows[panel], p, layer.size)]));
    if (otherKernel) setSize(layer);
    setColours(layer);
    drawMaps(layer, p);
    drawProfile("point", { ...near, flat: flatProfile(p, layer.size) });
    if (otherKernel) {
      drawProfile("layer", layer.profile);
      drawPicker(layer, kernelNow);
    }
    write(layer, near);
    readCell(p);
    setControls(layer, next);
    if (stay) history.replaceState(null, "", link());
  }

  // ---- controls, keys, pointer, address

  function setControls(layer, view) {
    const sets = byId("set");
    if (byId("layer").value !== layer.name || sets.length !== layer.sets.length) {
      sets.replaceChildren(...layer.sets.map(({ label }, i) => new Option(label, i)));
    }
    byId("kind").textContent = layer.grouped
      ? `Channels (${layer.sets.length} of ${layer.all_sets} pairs)` : `Share-set (of ${layer.sets.length})`;
    byId("layer").value = layer.name;
    sets.value = view.set;
    byId("row").max = layer.size[0] - 1;
    byId("column").max = layer.size[1] - 1;
    byId("row").value = view.row;
    byId("column").value = view.column;
    for (const name of ["scale", "span"]) {
      document.querySelector(`input[name=${name}][value=${view[name]}]`).checked = true;
    }
  }

  // The paper's point on its 16x16 map, (7, 7) counted from 1, and the same share of other maps.
  const paperPoint = ([rows, columns]) =>
    ({ row: Math.floor((3 * rows) / 8), column: Math.floor((3 * columns) / 8) });

  function chooseLayer(number) {
    const [old, { size, sets }] = [scene.layers[state.layer].size, scene.layers[number]];
    const same = old[0] === size[0] && old[1] === size[1];
    show({ ...state, ...(same ? {} : paperPoint(size)), layer: number, set: Math.min(state.set, sets.length - 1) });
  }

  function moveTo(row, column, stay = true) {
    const [rows, columns] = scene.layers[state.layer].size;
    if (!(row >= 0 && row < rows && column >= 0 && column < columns)) return;
    show({ ...state, row, column }, stay);
  }

  // Called by Bokeh, see _map in page.py.
  function pointer(name, event, { x, y }) {
    if (!state || !shown) return;
    const layer = scene.layers[state.layer];
    const [row, column] = [Math.round(y), Math.round(x)];
    const onMap = row >= 0 && row < layer.size[0] && column >= 0 && column < layer.size[1];
    const q = row * layer.size[1] + column;
    if (event === "tap") moveTo(row, column);
    else if (event === "mouseleave" || !onMap) name === "picker" ? show(state) : readCell(shown.p);
    else if (name === "picker") q !== shown.p && moveTo(row, column, false);
    else readCell(q);
  }

  const ARROWS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  function onKey(event) {
    // in a field the arrows choose within it
    if (!ARROWS[event.key] || event.target.closest("select, input") || event.ctrlKey || event.altKey || event.metaKey) {
      return;
    }
    event.preventDefault();
    const [dy, dx] = ARROWS[event.key];
    moveTo(state.row + dy, state.column + dx);
  }

  const link = () => "#" + new URLSearchParams({
    layer: scene.layers[state.layer].name, set: state.set, point: `${state.row},${state.column}`, scale: state.scale,
    colours: state.span,
  }).toString().replaceAll("%2C", ",");

  // Read the address; what it leaves out, or what this page does not hold, is as the page opens, and said.
  function fromLink() {
    const given = new URLSearchParams(location.hash.slice(1));
    const unknown = [];
    const choose = (key, possible, otherwise) => {
      if (!given.has(key)) return otherwise;
      if (possible(given.get(key))) return given.get(key);
      unknown.push(`${key}=${given.get(key)}`);
      return otherwise;
    };
    const names = scene.layers.map((layer) => layer.name);
    const layer = names.indexOf(choose("layer", (name) => names.includes(name), scene.opening));
    const { size, sets } = scene.layers[layer];
    const usual = paperPoint(size);
    const [row, column] = choose("point", (text) => {
      const [y, x] = text.split(",").map(Number);
      return /^\d+,\d+$/.test(text) && y < size[0] && x < size[1];
    }, `${usual.row},${usual.column}`).split(",").map(Number);
    const view = {
      layer, row, column,
      set: Number(choose("set", (text) => /^\d+$/.test(text) && Number(text) < sets.length, "0")),
      scale: choose("scale", (text) => ["log", "linear"].includes(text), "log"),
      span: choose("colours", (text) => ["point", "set"].includes(text), "point"),
    };
    byId("notice").hidden = !unknown.length;
    byId("notice").textContent = `The address asks for ${unknown.join(", ")}, which this page does not hold.`;
    return view;
  }

  function listen() {
    byId("layer").addEventListener("change", () => chooseLayer(byId("layer").selectedIndex));
    byId("set").addEventListener("change", () => show({ ...state, set: Number(byId("set").value) }));
    for (const id of ["row", "column"]) {
      byId(id).addEventListener("change", () => {
        moveTo(byId("row").valueAsNumber, byId("column").valueAsNumber);
        setControls(scene.layers[state.layer], state); // what lies outside the map goes back
      });
    }
    for (const name of ["scale", "span"]) {
      for (const button of document.querySelectorAll(`input[name=${name}]`)) {
        button.addEventListener("change", () => show({ ...state, [name]: button.value }));
      }
    }
    // Chosen by mouse, a list or button gives the keys back to the map; chosen by keys, it keeps them.
    let byPointer = false;
    byId("controls").addEventListener("pointerdown", () => { byPointer = true; });
    byId("controls").addEventListener("keydown", () => { byPointer = false; });
    byId("controls").addEventListener("change", (event) => {
      if (byPointer && event.target.type !== "number") event.target.blur();
    });
    document.addEventListener("keydown", onKey);
    window.addEventListener("hashchange", () => show(fromLink()));
  }

  // Bokeh makes its models once the page is read.
  async function start() {
    const ours = () => globalThis.Bokeh.documents.find((each) => each.get_model_by_name("map-merged"));
    while (!ours()) await new Promise((resume) => setTimeout(resume, 10));
    const known = new Map([...ours().all_models].filter((model) => model.name).map((model) => [model.name, model]));
    models = (name) => known.get(name);
    drawProfile("net", scene.net);
    await show(fromLink());
    listen();
    document.body.dataset.ready = "yes";
  }

  start().catch((error) => {
    byId("notice").hidden = false;
    byId("notice").textContent = `This page could not be drawn (${error}). It needs a browser of 2023 or later.`;
    throw error;
  });
  return { pointer };
})();
globalThis.kernelExplorer = kernelExplorer;
