"use strict";
/* Draws the JSON of `llmc show --html` (compiler/picture.py says what is in it). Boxes are HTML that the browser has
   measured; dagre says where they go. `{i}` in a name stands for the layer. */

const data = JSON.parse(document.getElementById("data").textContent);
const phases = Object.keys(data.phases);
const byId = (id) => document.getElementById(id);
const now = { view: data.views[0], layer: 0, scale: 1, fit: true, stacked: false, words: [], chosen: null };
const layerOf = Object.fromEntries(Object.keys(data.blocks).map((block) => [block, 0]));
const panes = {}; // "model" or a phase -> {pane, canvas, boxes: [{node, layer, element}], paths}

// ---- names

const at = (text, layer) => text.replace(/\{i([+-]\d+)?\}/g, (_, by) => layer + Number(by || 0));
const isBlock = (view) => view in data.blocks;
const viewName = (view, layer) => (isBlock(view) ? `${view}.${layer}` : view);

/** The name without the layer that the view shows anyway. */
function short(name, view, layer) {
  const front = `${view}.${layer}.`;
  return isBlock(view) && name.startsWith(front) ? name.slice(front.length) : name;
}

function drawingOf(phase, view, layer) {
  const { kinds, kind_of } = data.phases[phase].views[view];
  return kinds[kind_of[layer]];
}

/** Where the operation of that full name stands: {where, view, layer, node}, or undefined. */
function find(name, places = phases) {
  const match = name.match(/^(.*?)\.(\d+)\./);
  const inBlock = match && isBlock(match[1]);
  const layer = inBlock ? Number(match[2]) : 0;
  if (inBlock && layer >= data.blocks[match[1]]) return undefined;
  const views = inBlock ? [match[1]] : data.views.filter((view) => !isBlock(view));
  for (const where of places) {
    for (const view of views) {
      const node = drawingOf(where, view, layer).nodes.find((n) => at(n.id, layer) === name);
      if (node) return { where, view, layer, node };
    }
  }
  return undefined;
}

function modelNodes(block, layer) {
  if (!block) return data.model.outside.nodes;
  const { kinds, kind_of } = data.model.blocks[block];
  return kinds[kind_of[layer]].nodes;
}

/** Full names of the operations that compute the operator in a phase. */
const linksOf = (node, phase, layer) => (node.links[phase] || []).map((link) => at(link, layer));

// ---- measured times

const operationsTime = (where, name) => (data.times && data.times[where] ? data.times[where][name] : undefined);

/** What was measured of a box, by phase: [[phase, us, share, names it has one time with]]. An operator has the times of
    the operations that compute it. */
function timesOf(where, node, layer) {
  if (!data.times) return [];
  return (where === "model" ? phases : [where]).flatMap((phase) => {
    const names = where === "model" ? linksOf(node, phase, layer) : [at(node.id, layer)];
    const found = names.map((name) => operationsTime(phase, name)).filter(Boolean);
    if (!found.length) return [];
    const joined = new Set(found.flatMap((one) => one[2]).filter((name) => !names.includes(name)));
    // Operations of this box that have one time count once.
    const apart = found.filter((one, i) => !found.slice(0, i).some((other) => other[2].includes(names[i])));
    const sum = (i) => apart.reduce((total, one) => total + one[i], 0);
    return [[phase, sum(0), sum(1), [...joined]]];
  });
}

const most = {}; // phase -> the largest share of an operation
for (const [phase, times] of Object.entries(data.times || {})) {
  most[phase] = Math.max(...Object.values(times).map(([, share]) => share));
}

function micros(us) {
  if (us >= 1e4) return `${(us / 1e3).toFixed(1)} ms`;
  return us >= 1e3 ? `${(us / 1e3).toFixed(2)} ms` : `${us.toFixed(us < 100 ? 1 : 0)} µs`;
}

const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 2 : 1)} %`;

// ---- elements

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key === "class") element.className = value;
    else element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

const letters = (text) => text.split(" ").filter(Boolean).map((one) => make("i", { class: `letter ${one[0]}` }, one));

function box(where, node, view, layer, choose) {
  const name = short(at(node.name, layer), view, layer);
  const element = make(
    "button",
    { class: `node ${node.kind}`, "data-name": at(node.id, layer), onclick: () => choose(node, layer) },
    make("span", { class: "top" }, make("b", {}, node.title), ...letters(node.letter)),
    make("span", { class: "name" }, name),
  );
  const times = timesOf(where, node, layer);
  if (times.length) {
    const said = times.map(([phase, us, , joined]) => (
      `${where === "model" ? `${phase} ` : ""}${micros(us)}${joined.length ? " joined" : ""}`));
    element.append(make("span", { class: "time" }, said.join(", ")));
    element.classList.add("timed");
    element.style.setProperty("--heat", Math.max(...times.map(([phase, , share]) => share / most[phase])).toFixed(3));
  }
  const params = node.lines.filter(([label]) => label === "param").map((line) => line[2]);
  if (params.length) element.append(make("span", { class: "line" }, params.join("  ")));
  for (const [label, tensor, text, letter] of node.lines) {
    if (label === "param") continue;
    const line = make("span", { class: "line" });
    if (label) line.append(make("span", { class: "label" }, label), " ");
    const called = tensor && short(at(tensor, layer), view, layer);
    if (called && called !== name) line.append(make("b", {}, called), " ");
    line.append(text, " ");
    if (label) line.append(...letters(letter));
    element.append(line);
  }
  if (node.kind === "operation") element.append(make("span", { class: "place" }, node.place));
  return element;
}

function carries(lines, view, layer) {
  return make(
    "div",
    { class: "carries" },
    ...lines.map(([, tensor, text, letter]) => {
      const called = tensor ? `${short(at(tensor, layer), view, layer).split(".").pop()} ` : "";
      return make("span", {}, `${called}${text} `, ...letters(letter));
    }),
  );
}

const SVG = "http://www.w3.org/2000/svg";

function svg(tag, attributes) {
  const element = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

/** A smooth line through the middles between dagre's points. */
function line(points) {
  const [first, ...rest] = points;
  const last = rest.pop();
  let path = `M${first.x},${first.y}`;
  rest.forEach((p, i) => {
    const q = i + 1 < rest.length ? { x: (p.x + rest[i + 1].x) / 2, y: (p.y + rest[i + 1].y) / 2 } : last;
    path += `Q${p.x},${p.y} ${q.x},${q.y}`;
  });
  return rest.length ? path : `${path}L${last.x},${last.y}`;
}

// ---- drawing

/** items: [{node, view, layer, group}], edges: [{from, to, lines, view, layer}] with raw ids. */
function draw(where, items, edges, spacing, choose) {
  const { pane } = panes[where];
  const form = now.fit ? `fitted ${now.stacked && where !== "model" ? "stacked" : ""}` : "";
  const canvas = make("div", { class: `canvas ${form}` });
  pane.replaceChildren(canvas);
  const graph = new dagre.graphlib.Graph({ compound: true });
  const tight = { nodesep: 12, ranksep: 13, edgesep: 6, marginx: 8, marginy: 8 };
  graph.setGraph({ rankdir: "TB", marginx: 14, marginy: 20, ...spacing, ...(now.fit ? tight : {}) });
  const lines = svg("svg", {});
  const marker = svg("marker", {
    id: `tip-${where}`, viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 6, markerHeight: 6, orient: "auto",
  });
  marker.append(svg("path", { d: "M0,0L8,4L0,8z" }));
  lines.append(marker);
  canvas.append(lines);

  const boxes = items.map(({ node, view, layer, group }) => {
    const element = box(where, node, view, layer, choose);
    canvas.append(element);
    return { node, view, layer, group, element };
  });
  const groups = [...new Set(boxes.map((b) => b.group).filter(Boolean))];
  for (const group of groups) graph.setNode(`block ${group}`, {});
  for (const { node, group, element } of boxes) {
    graph.setNode(node.id, { width: element.offsetWidth, height: element.offsetHeight });
    if (group) graph.setParent(node.id, `block ${group}`);
  }
  const drawn = edges.filter((e) => graph.hasNode(e.from) && graph.hasNode(e.to)).map((edge) => {
    const label = edge.lines.length && !now.fit ? carries(edge.lines, edge.view, edge.layer) : null;
    if (label) canvas.append(label);
    const size = label ? { width: label.offsetWidth, height: label.offsetHeight, labelpos: "c" } : {};
    graph.setEdge(edge.from, edge.to, size);
    return { edge, label };
  });

  dagre.layout(graph);

  for (const { node, element } of boxes) place(element, graph.node(node.id));
  const paths = drawn.map(({ edge, label }) => {
    const laid = graph.edge(edge.from, edge.to);
    const path = svg("path", { d: line(laid.points), "marker-end": `url(#tip-${where})` });
    lines.append(path);
    if (label) place(label, { ...laid, width: label.offsetWidth, height: label.offsetHeight });
    return { edge, path };
  });
  for (const group of groups) canvas.prepend(frame(group, graph.node(`block ${group}`)));
  const { width, height } = graph.graph();
  Object.assign(canvas.style, { width: `${width}px`, height: `${height}px` });
  lines.setAttribute("width", width);
  lines.setAttribute("height", height);
  Object.assign(panes[where], { canvas, boxes, paths, width, height });
}

function place(element, { x, y, width, height }) {
  element.style.left = `${x - width / 2}px`;
  element.style.top = `${y - height / 2}px`;
}

function frame(block, area) {
  const title = make("button", {}, `${block} × ${data.blocks[block]}`);
  const element = make("div", { class: "block", onclick: () => show(block, layerOf[block]) }, title);
  Object.assign(element.style, { width: `${area.width}px`, height: `${area.height}px` });
  place(element, area);
  return element;
}

/** Fitted: all of the drawing in its column. Else as large as fits the width, but never unreadable, then as the reader
    likes. Both phases alike. Fitted into a narrow column, the boxes of a phase have two rows. */
function refit() {
  const { clientWidth, clientHeight } = panes[phases[0]].pane;
  const stacked = now.fit && clientWidth < 0.85 * clientHeight;
  if (stacked !== now.stacked) {
    now.stacked = stacked;
    phases.forEach(drawPhase);
    mark();
  }
  for (const group of [["model"], phases]) {
    const drawn = group.map((where) => panes[where]);
    const across = Math.min(...drawn.map(({ pane, width }) => pane.clientWidth / width));
    const down = Math.min(...drawn.map(({ pane, height }) => pane.clientHeight / height));
    const least = group === phases ? 0.85 : 0.7;
    const scale = now.fit ? Math.min(1.3, across, down) : Math.min(1, Math.max(least, across)) * now.scale;
    for (const { canvas } of drawn) canvas.style.zoom = String(scale);
  }
}

/** The whole drawing in the window, or boxes that tell all and can be read. */
function fit(wanted, scale = 1) {
  const redraw = wanted !== now.fit;
  Object.assign(now, { fit: wanted, scale });
  byId("fit").setAttribute("aria-pressed", String(wanted));
  if (redraw) {
    drawModel();
    phases.forEach(drawPhase);
  }
  refit();
  if (redraw) {
    ["model", ...phases].forEach(center);
    mark();
    if (now.chosen) bringIntoSight(".chosen, .linked");
  }
}

/** The middle column of a drawing at its top. */
function center(where) {
  const { pane, boxes } = panes[where];
  const middle = boxes.find(({ node }) => node.kind !== "in") || boxes[0];
  if (middle) middle.element.scrollIntoView({ block: "end", inline: "center" });
  pane.scrollTop = 0;
}

function drawModel() {
  const items = data.model.outside.nodes.map((node) => ({ node, view: "", layer: 0, group: "" }));
  const edges = data.model.outside.edges.map((edge) => ({ ...edge, view: "", layer: 0 }));
  for (const [block, { kinds, kind_of }] of Object.entries(data.model.blocks)) {
    const layer = layerOf[block];
    const drawing = kinds[kind_of[layer]];
    items.push(...drawing.nodes.map((node) => ({ node, view: block, layer, group: block })));
    edges.push(...drawing.edges.map((edge) => ({ ...edge, view: block, layer })));
  }
  draw("model", items, edges, { nodesep: 16, ranksep: 22, edgesep: 8 }, chooseOperator);
}

function drawPhase(phase) {
  const { view, layer } = now;
  const drawing = drawingOf(phase, view, layer);
  const items = drawing.nodes.map((node) => ({ node, view, layer, group: "" }));
  const edges = drawing.edges.map((edge) => ({ ...edge, view, layer }));
  draw(phase, items, edges, { nodesep: 14, ranksep: 30, edgesep: 8 }, chooseOperation(phase));
  const { sums } = panes[phase];
  sums.textContent = drawing.facts.map(([label, text]) => `${label} ${text}`).join(", ");
  sums.parentElement.title = sums.textContent;
}

// ---- what is shown

/** Show a view (a block's layer, or what stands outside layers) in both phases. */
function show(view, layer) {
  const place = `${view} ${layer}`;
  if (place !== now.place) {
    const model = isBlock(view) && layerOf[view] !== layer;
    Object.assign(now, { view, layer, place, chosen: null });
    if (isBlock(view)) layerOf[view] = layer;
    if (model) drawModel();
    phases.forEach(drawPhase);
    refit();
    (model ? ["model", ...phases] : phases).forEach(center);
    byId("view").value = place;
    byId("alike").textContent = alike(view, layer);
    const cells = document.querySelectorAll(".cell");
    cells.forEach((cell) => cell.classList.toggle("current", cell.dataset.place === place));
    mark();
  }
}

/** "drawn alike: layers 1-38" */
function alike(view, layer) {
  if (!isBlock(view)) return "";
  const same = [];
  for (let other = 0; other < data.blocks[view]; other += 1) {
    if (phases.every((p) => drawingOf(p, view, other) === drawingOf(p, view, layer))) same.push(other);
  }
  if (same.length < 2) return "no other layer is like this one";
  return `${same.length} layers are like this one: ${same[0]} to ${same[same.length - 1]}`;
}

function step(by) {
  const options = [...byId("view").options];
  const next = options[byId("view").selectedIndex + by];
  if (next) show(...placeOf(next.value));
}

function placeOf(text) {
  const cut = text.lastIndexOf(" ");
  return [text.slice(0, cut), Number(text.slice(cut + 1))];
}

// ---- choosing

function chooseOperator(node, layer) {
  const inBlock = Object.keys(data.blocks).find((block) => at(node.id, layer).startsWith(`${block}.${layer}.`));
  const found = phases.flatMap((phase) => linksOf(node, phase, layer).map((link) => find(link, [phase])));
  const first = found.find(Boolean);
  if (inBlock) show(inBlock, layer);
  else if (first) show(first.view, first.layer);
  choose("model", node, inBlock || "", layer);
}

const chooseOperation = (phase) => (node, layer) => {
  const target = node.goto && find(at(node.goto, layer), [phase]);
  if (target) jump(target);
  else choose(phase, node, now.view, layer);
};

/** Go to what `find` gave, or to a hit of the search. */
function jump({ where, view, layer, node }) {
  if (where === "model") {
    chooseOperator(node, layer);
  } else {
    show(view, layer);
    choose(where, node, view, layer);
  }
}

function choose(where, node, view, layer) {
  now.chosen = node ? { where, node, view, layer } : null;
  mark();
  if (node) describe(where, node, view, layer);
  else byId("details").hidden = true;
  refit();
  bringIntoSight(".chosen, .linked");
}

/** The first box of each drawing that the selector fits comes into sight. */
function bringIntoSight(selector) {
  for (const where of ["model", ...phases]) {
    const target = panes[where].boxes.find(({ element }) => element.matches(selector));
    if (target) target.element.scrollIntoView({ block: "center", inline: "nearest" });
  }
}

/** Operators that the operation of this full name computes, as [node, layer]: of this layer, of its neighbours, and
    outside layers. */
function operatorsOf(phase, name, view, layer) {
  const found = [];
  const look = (nodes, i) => {
    for (const node of nodes) if (linksOf(node, phase, i).includes(name)) found.push([node, i]);
  };
  look(data.model.outside.nodes, 0);
  for (const [block, count] of Object.entries(data.blocks)) {
    const middle = isBlock(view) ? [layer - 1, layer, layer + 1] : [0, count - 1];
    for (const i of new Set(middle)) if (i >= 0 && i < count) look(modelNodes(block, i), i);
  }
  return found;
}

/** Classes of all boxes: chosen, linked to the chosen, hit by the search. */
function mark() {
  const { chosen } = now;
  const name = chosen && at(chosen.node.id, chosen.layer);
  const linked = new Set();
  if (chosen) {
    const { where, node, view, layer } = chosen;
    for (const [operator, i] of where === "model" ? [[node, layer]] : operatorsOf(where, name, view, layer)) {
      linked.add(`model ${at(operator.id, i)}`);
      for (const phase of phases) linksOf(operator, phase, i).forEach((id) => linked.add(`${phase} ${id}`));
    }
  }
  for (const where of ["model", ...phases]) {
    const { boxes = [], paths = [] } = panes[where];
    const bright = new Set();
    for (const { node, layer, element } of boxes) {
      const full = at(node.id, layer);
      const isChosen = Boolean(chosen) && chosen.where === where && full === name;
      element.classList.toggle("chosen", isChosen);
      element.classList.toggle("linked", linked.has(`${where} ${full}`) && where !== chosen.where);
      const hit = now.words.length > 0 && Boolean(matches(entryOf.get(node), layer));
      element.classList.toggle("hit", hit);
      element.classList.toggle("dim", now.words.length > 0 && !hit);
      if (isChosen) bright.add(node.id);
    }
    for (const { edge, path } of paths) path.classList.toggle("bright", bright.has(edge.from) || bright.has(edge.to));
  }
}

function describe(where, node, view, layer) {
  const full = at(node.name, layer);
  const rows = node.details.map(([label, name, text, letter]) => {
    const cell = make("td");
    const named = name && at(name, layer);
    const target = named && label.endsWith(", ATB") && find(named, [label.split(",")[0]]);
    if (target) cell.append(make("button", { onclick: () => jump(target) }, named));
    else if (named) cell.append(make("b", {}, named));
    cell.append(named && text ? ` ${text} ` : `${text} `, ...letters(letter));
    return [label, cell];
  });
  const measured = timesOf(where, node, layer).map(([phase, us, share, joined]) => {
    const words = `${micros(us)}, ${percent(share)} of the operations' time`;
    const also = joined.length ? `; one time with ${joined.join(", ")}` : "";
    return [where === "model" ? `${phase}, time` : "time", make("td", {}, words + also)];
  });
  rows.unshift(...measured);
  if (where !== "model" && node.kind === "operation") {
    for (const [operator, i] of operatorsOf(where, full, view, layer)) {
      const go = () => jump({ where: "model", layer: i, node: operator });
      rows.push(["computes", make("td", {}, make("button", { onclick: go }, at(operator.name, i)))]);
    }
    const parts = data.phases[where].segments;
    const key = isBlock(view) ? `${view} ${layer}` : `${full} -1`;
    const number = parts.findIndex((part) => part.layers.some((label) => label.join(" ") === key));
    if (number >= 0) rows.push(["segment", make("td", {}, `${number + 1} of ${parts.length}`)]);
  }
  if (!node.details.length) rows.push(["type", make("td", {}, `${node.lines[0][2]} `, ...letters(node.letter))]);
  const place = where === "model" ? "model" : `${where}, ${viewName(view, layer)}`;
  const close = make("button", { class: "close", title: "close ( Escape )", onclick: () => choose("", null) }, "×");
  byId("details").replaceChildren(
    close,
    make("h2", {}, node.title, " ", ...letters(node.letter)),
    make("p", {}, make("code", {}, full), make("br"), node.place ? `${place}; ${node.place}` : place),
    make("table", {}, make("tbody", {}, ...rows.map(([label, cell]) => make("tr", {}, make("th", {}, label), cell)))),
  );
  byId("details").scrollTop = 0;
  byId("details").hidden = false;
}

// ---- search

/** Everything that can be found: {where, view, node, kind_of, kind}. A kind stands for all layers that have it. */
const index = [];
const entryOf = new Map();

function addToIndex(where, view, node, kind_of, kind) {
  const entry = { where, view, node, kind_of, kind };
  const lines = [...node.lines, ...node.details].map((one) => one.filter(Boolean).join(" "));
  const said = [node.title, node.name, node.place, ...lines];
  entry.said = said;
  entry.texts = said.map((text) => text.toLowerCase());
  index.push(entry);
  entryOf.set(node, entry);
}

function buildIndex() {
  for (const node of data.model.outside.nodes) addToIndex("model", "", node, [0], 0);
  for (const [block, { kinds, kind_of }] of Object.entries(data.model.blocks)) {
    kinds.forEach((drawing, kind) => drawing.nodes.forEach((node) => addToIndex("model", block, node, kind_of, kind)));
  }
  for (const phase of phases) {
    for (const view of data.views) {
      const { kinds, kind_of } = data.phases[phase].views[view];
      kinds.forEach((drawing, kind) => {
        for (const node of drawing.nodes) if (node.kind === "operation") addToIndex(phase, view, node, kind_of, kind);
      });
    }
  }
}

/** Words of a query. The first number after a dot may be a layer: `layers.5.attn` is also looked for as
    `layers.{i}.attn`. */
function wordsOf(query) {
  return query.toLowerCase().split(/\s+/).filter(Boolean).map((word) => {
    const match = word.match(/^(.*?(?:^|\.))(\d+)((?:\.|$).*)$/);
    return match && match[1] ? { word, general: `${match[1]}{i}${match[3]}`, layer: Number(match[2]) } : { word };
  });
}

/** What of the entry fits all words, for this layer if one is given: {layer, text}, or null. */
function matches(entry, layer) {
  if (!entry) return null;
  let said = "";
  let meant = layer;
  for (const { word, general, layer: asked } of now.words) {
    const plain = entry.texts.findIndex((text) => text.includes(word));
    const inLayer = general && (layer === undefined || layer === asked) && entry.kind_of[asked] === entry.kind
      ? entry.texts.findIndex((text) => text.includes(general)) : -1;
    if (plain < 0 && inLayer < 0) return null;
    if (plain < 0) meant = asked;
    said = entry.said[plain < 0 ? inLayer : plain];
  }
  return { layer: meant, text: said };
}

function hitsOf() {
  const found = new Map();
  for (const entry of index) {
    const match = matches(entry);
    if (!match) continue;
    const current = isBlock(entry.view) ? layerOf[entry.view] : 0;
    const fits = entry.kind_of[current] === entry.kind;
    const layer = match.layer ?? (fits ? current : entry.kind_of.indexOf(entry.kind));
    const key = `${entry.where} ${entry.node.id}`;
    if (!found.has(key) || (fits && match.layer === undefined)) {
      found.set(key, { where: entry.where, view: entry.view, node: entry.node, layer, text: match.text });
    }
  }
  return [...found.values()];
}

let hits = [];
let picked = -1;

function search() {
  now.words = wordsOf(byId("search").value);
  hits = now.words.length ? hitsOf() : [];
  picked = -1;
  const list = byId("hits");
  const shown = hits.slice(0, 200).map((hit, number) => {
    const name = at(hit.node.name, hit.layer);
    const why = at(hit.text, hit.layer);
    return make(
      "li",
      { role: "option", id: `hit-${number}`, "aria-selected": "false", onclick: () => pick(number) },
      make("span", { class: "where" }, hit.where), " ", make("b", {}, hit.node.title), ` ${name} `,
      make("span", { class: "why" }, [name, hit.node.title].includes(why) ? "" : why),
    );
  });
  if (!hits.length) shown.push(make("li", { role: "option" }, "nothing is called or says so"));
  list.replaceChildren(...shown);
  openHits(now.words.length > 0);
  mark();
  bringIntoSight(".hit");
}

function openHits(open) {
  byId("hits").hidden = !open;
  byId("search").setAttribute("aria-expanded", String(open));
}

/** Jump to a hit; the list stays so that the next one is a key away. */
function pick(number) {
  if (!hits.length) return;
  picked = (number + hits.length) % hits.length;
  jump(hits[picked]);
  byId("hits").querySelectorAll("li").forEach((item, i) => {
    item.setAttribute("aria-selected", String(i === picked));
    if (i === picked) item.scrollIntoView({ block: "nearest" });
  });
  byId("search").setAttribute("aria-activedescendant", `hit-${picked}`);
}

function keys(event) {
  const typing = event.target.matches("input, select");
  if (event.key === "/" && !typing) {
    byId("search").focus();
    event.preventDefault();
  } else if (event.key === "Escape") {
    byId("search").value = "";
    search();
    choose("", null);
  } else if (event.target === byId("search")) {
    const by = { Enter: event.shiftKey ? -1 : 1, ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!by) return;
    pick(picked < 0 && by < 0 ? -1 : picked + by);
    if (event.key === "Enter") openHits(false);
    else openHits(true);
    event.preventDefault();
  } else if (!typing && (event.key === "[" || event.key === "]")) {
    step(event.key === "[" ? -1 : 1);
  } else if (!typing && event.key === "f" && !event.ctrlKey && !event.metaKey && !event.altKey) {
    fit(!now.fit);
  }
}

// ---- the page

function header() {
  byId("head").textContent = data.head;
  for (const [label, text] of data.facts) {
    byId("facts").append(make("div", {}, make("dt", {}, label), make("dd", {}, text)));
  }
  for (const phase of phases) {
    const strip = make("div", { class: "strip" }, ...data.phases[phase].segments.map(segment));
    byId("segments").append(make("h3", {}, phase), strip);
  }
}

function segment({ layers, counts, ends }, number, all) {
  const title = make("p", {}, `segment ${number + 1} of ${all.length}: ${ends}`);
  const cells = layers.map(([name, layer]) => {
    const target = layer < 0 ? phases.map((phase) => find(name, [phase])).find(Boolean) : { view: name, layer };
    const [view, place] = target ? [target.view, target.layer] : [data.views[0], 0];
    const text = layer < 0 ? name : String(layer);
    const go = () => show(view, place);
    const kind = layer < 0 ? "named" : layer % 10 ? "" : "tenth";
    return make("button", { class: `cell ${kind}`, "data-place": `${view} ${place}`, title: text, onclick: go }, text);
  });
  const style = `--cells: ${layers.length}`;
  const about = `${ends}\n${counts}`;
  return make("div", { class: "segment", title: about, style }, title, make("div", { class: "cells" }, ...cells));
}

/** Numbers that have no room are left out, but for each tenth. */
function thin() {
  for (const strip of document.querySelectorAll(".strip")) {
    const cells = [...strip.querySelectorAll(".cell:not(.named)")];
    strip.classList.toggle("dense", cells.some((cell) => cell.clientWidth < 6 * cell.textContent.length + 3));
  }
}

function start() {
  header();
  buildIndex();
  panes.model = { pane: document.querySelector("#model .pane") };
  for (const phase of phases) {
    const sums = make("span", {});
    const pane = make("div", { class: "pane" });
    byId("phases").append(make("section", { class: "phase", id: phase }, make("h2", {}, phase, sums), pane));
    panes[phase] = { pane, sums };
  }
  for (const view of data.views) {
    for (let layer = 0; layer < (data.blocks[view] || 1); layer += 1) {
      byId("view").append(make("option", { value: `${view} ${layer}` }, viewName(view, layer)));
    }
  }
  drawModel();
  show(data.views.find(isBlock) || data.views[0], 0);
  byId("view").addEventListener("change", (event) => show(...placeOf(event.target.value)));
  byId("previous").addEventListener("click", () => step(-1));
  byId("next").addEventListener("click", () => step(1));
  for (const [id, by] of [["smaller", 1 / 1.2], ["larger", 1.2]]) {
    byId(id).addEventListener("click", () => fit(false, now.fit ? 1 : now.scale * by));
  }
  byId("fit").addEventListener("click", () => fit(!now.fit));
  byId("search").addEventListener("input", search);
  byId("search").addEventListener("focus", () => openHits(now.words.length > 0));
  document.addEventListener("click", (event) => {
    if (!byId("finder").contains(event.target)) openHits(false);
  });
  document.addEventListener("keydown", keys);
  window.addEventListener("resize", () => {
    refit();
    thin();
  });
  thin();
}

start();
