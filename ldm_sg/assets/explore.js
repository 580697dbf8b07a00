// The map of the images: colour by a column, find, zoom until points are pictures; and the rows of clusters, sorted.
const {columns: {key: keys, image: pictures, x: xs, y: ys, ...columns}, clusters} = JSON.parse(document.getElementById("data").textContent);
const el = id => document.getElementById(id), xy = xs.map((x, i) => [x, ys[i]]);
el("explore").innerHTML = `<div class="tools"><label>colour <select id="colour"></select></label>
  <label>find <input id="find" type="search" placeholder="name, key, cluster 7"></label><span id="legend"></span></div>
  <div class="map"><canvas id="points" aria-label="map of the images"></canvas><aside id="seen"></aside></div>`;
const canvas = el("points"), pen = canvas.getContext("2d");
const WORDS = new Set(["k", "class", "name"]);  // columns of kinds, not of amounts
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const make = (tag, parts = {}, ...inside) => { const e = Object.assign(document.createElement(tag), parts); e.append(...inside); return e; };
const said = name => name === "k" ? "cluster" : name.replace("_", " ");
const at = i => "data:image/webp;base64," + pictures[i];
const loaded = new Map();  // pictures that have been drawn
let view = {x: 0.5, y: 0.5, zoom: 1}, picked = null, found = null, over = null, paint = [];

const hue = i => `hsl(${(i * 222.5) % 360} ${60 + 15 * (i % 2)}% ${[48, 62, 38][i % 3]}%)`;
const ramp = share => `hsl(${250 - 205 * share} 75% ${38 + 20 * share}%)`;
function colour() {
  const name = el("colour").value, column = columns[name] || keys.map(() => 0), legend = el("legend");
  const known = column.filter(v => v !== null);
  legend.replaceChildren();
  if (WORDS.has(name)) {
    const kinds = [...new Set(known)].sort((a, b) => typeof a === "number" ? a - b : a < b ? -1 : 1), of = new Map(kinds.map((v, i) => [v, hue(i)]));
    paint = column.map(v => of.get(v) || "#8b949e");
    for (const kind of kinds.slice(0, 24)) legend.append(make("i", {style: `background:${of.get(kind)}`}), ` ${kind} `);
    if (kinds.length > 24) legend.append(`… ${kinds.length} in all`);
  } else {
    const low = known.reduce((a, b) => Math.min(a, b), Infinity), high = known.reduce((a, b) => Math.max(a, b), -Infinity);
    paint = column.map(v => v === null ? "#8b949e" : ramp((v - low) / (high - low || 1)));
    const stops = [0, 0.25, 0.5, 0.75, 1].map(ramp).join(",");
    legend.append(`${+low.toFixed(3)} `, make("i", {className: "ramp", style: `background:linear-gradient(90deg,${stops})`}), ` ${+high.toFixed(3)}`);
  }
  draw();
}

const span = Math.max(...xy.map(p => p[1]), 1e-9), wide = Math.max(...xy.map(p => p[0]), 1e-9);
const place = ([x, y]) => {  // on the canvas; both directions by one scale, as they were measured
  const scale = 0.94 * Math.min(canvas.clientWidth / wide, canvas.clientHeight / span) * view.zoom;
  return [canvas.clientWidth / 2 + (x - view.x * wide) * scale, canvas.clientHeight / 2 - (y - view.y * span) * scale];
};
function draw() {
  const ratio = devicePixelRatio || 1, {clientWidth: w, clientHeight: h} = canvas;
  if (canvas.width !== Math.round(w * ratio)) [canvas.width, canvas.height] = [w * ratio, h * ratio].map(Math.round);
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, w, h);
  const faint = i => (picked !== null && columns.k[i] !== picked) || (found && !found.has(i));
  const seen = [];
  xy.forEach((p, i) => { const [x, y] = place(p); if (x > -30 && x < w + 30 && y > -30 && y < h + 30) seen.push([i, x, y]); });
  const big = seen.length < 700, r = Math.max(2.2, Math.min(5, 120 / Math.sqrt(seen.length + 1)));
  for (const [i, x, y] of seen.sort((a, b) => faint(b[0]) - faint(a[0]))) {
    pen.globalAlpha = faint(i) ? 0.12 : 0.9;
    if (big) {
      if (!loaded.has(i)) loaded.set(i, make("img", {src: at(i), onload: draw}));
      pen.fillStyle = paint[i]; pen.fillRect(x - 22, y - 22, 44, 44);
      if (loaded.get(i).complete) pen.drawImage(loaded.get(i), x - 20, y - 20, 40, 40);
    } else { pen.fillStyle = paint[i]; pen.beginPath(); pen.arc(x, y, r, 0, 7); pen.fill(); }
  }
  pen.globalAlpha = 1;
  if (over !== null) { const [x, y] = place(xy[over]); pen.strokeStyle = css("--ink"); pen.lineWidth = 2; pen.beginPath(); pen.arc(x, y, r + 4, 0, 7); pen.stroke(); }
}

function nearest(event) {
  const box = canvas.getBoundingClientRect(), mx = event.clientX - box.left, my = event.clientY - box.top;
  let best = null, least = 24 ** 2;
  xy.forEach((p, i) => { const [x, y] = place(p), d = (x - mx) ** 2 + (y - my) ** 2; if (d < least) [best, least] = [i, d]; });
  return best;
}
function show() {
  const aside = el("seen"); aside.replaceChildren();
  if (over === null && picked === null) aside.append(make("p", {}, "Point at an image."));
  if (over !== null) {
    const facts = Object.entries(columns).filter(([, c]) => c[over] !== null).map(([name, c]) => make("div", {}, `${said(name)}: ${typeof c[over] === "number" ? +c[over].toFixed(3) : c[over]}`));
    aside.append(make("img", {src: at(over), width: 96, height: 96, alt: keys[over]}), make("b", {}, keys[over]), ...facts);
  }
  if (picked !== null) {
    const own = keys.map((_, i) => i).filter(i => columns.k[i] === picked);
    if (columns.distance) own.sort((a, b) => columns.distance[a] - columns.distance[b]);
    const row = el("cluster-" + picked), title = row ? row.querySelector("b").textContent : `Cluster ${picked}`;
    aside.append(make("p", {className: "picked"}, row ? make("a", {href: "#cluster-" + picked}, title) : title, own.length > 48 ? `, 48 of its ${own.length} here` : `, ${own.length} here`),
      make("div", {className: "own"}, ...own.slice(0, 48).map(i => make("img", {src: at(i), title: keys[i], alt: keys[i], width: 40, height: 40}))));
  }
}
const pick = k => { picked = columns.k && k !== picked ? k : null; show(); draw(); };

let drag = null;
canvas.onpointerdown = e => { drag = {x: e.clientX, y: e.clientY, moved: false}; canvas.setPointerCapture(e.pointerId); };
canvas.onpointermove = e => {
  if (drag) {
    const scale = 0.94 * Math.min(canvas.clientWidth / wide, canvas.clientHeight / span) * view.zoom, dx = e.clientX - drag.x, dy = e.clientY - drag.y;
    if (drag.moved || Math.hypot(dx, dy) > 4) { view.x -= dx / scale / wide; view.y += dy / scale / span; drag = {x: e.clientX, y: e.clientY, moved: true}; draw(); }
  } else { const i = nearest(e); if (i !== over) { over = i; show(); draw(); } }
};
canvas.onpointerup = e => { if (drag && !drag.moved) { const i = nearest(e); over = i; pick(i === null || !columns.k ? null : columns.k[i]); } drag = null; };
canvas.addEventListener("wheel", e => {
  e.preventDefault();
  const box = canvas.getBoundingClientRect(), mx = e.clientX - box.left - box.width / 2, my = e.clientY - box.top - box.height / 2;
  const zoom = Math.max(1, Math.min(200, view.zoom * Math.exp(-e.deltaY / 300))), base = 0.94 * Math.min(box.width / wide, box.height / span);
  view.x += mx * (1 / view.zoom - 1 / zoom) / base / wide; view.y -= my * (1 / view.zoom - 1 / zoom) / base / span; view.zoom = zoom;
  if (zoom === 1) view = {x: 0.5, y: 0.5, zoom: 1};
  draw();
}, {passive: false});

const id = row => +row.id.slice("cluster-".length);
const rows = [...document.querySelectorAll(".row")], home = rows.length ? rows[0].parentElement : null, folded = home && home.querySelector("details");
el("find").oninput = e => {
  const text = e.target.value.trim().toLowerCase(), says = row => [...row.querySelector("div").children].map(part => part.textContent).join("\n").toLowerCase();
  found = text ? new Set(keys.map((_, i) => i).filter(i => keys[i].toLowerCase().includes(text) || `cluster ${columns.k?.[i]}` === text || `${columns.name?.[i] ?? ""}`.toLowerCase().includes(text))) : null;
  if (text && folded) folded.open = true;
  for (const row of rows) row.hidden = Boolean(text) && !says(row).includes(text) && !(columns.k && [...found].some(i => columns.k[i] === id(row)));
  draw();
};
if (home) {
  const order = make("select", {}, ...["id", "size", "purity", "names"].filter(by => by === "id" || clusters.some(c => by === "names" ? c.names.length : c[by] !== null)).map(by => make("option", {}, by)));
  const inside = folded ? rows.filter(r => !folded.contains(r)).length : rows.length;
  order.onchange = () => {
    const by = order.value, of = row => by === "id" ? -id(row) : clusters[id(row)][by];
    rows.sort((a, b) => by === "names" ? of(a).join().localeCompare(of(b).join()) : of(b) - of(a) || id(a) - id(b));
    rows.forEach((row, i) => i < inside ? home.insertBefore(row, folded) : folded.append(row));
  };
  home.insertBefore(make("div", {className: "tools"}, make("label", {}, "sort by ", order)), rows[0]);
}
addEventListener("hashchange", () => {  // a link to a row that is folded away, or hidden by what is looked for
  const row = el(location.hash.slice(1));
  if (!row || !row.classList.contains("row")) return;
  row.hidden = false;
  row.closest("details")?.setAttribute("open", "");
  row.scrollIntoView({block: "center"});
});
for (const name of Object.keys(columns)) el("colour").append(make("option", {value: name}, said(name)));
addEventListener("resize", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
show(); colour(); el("colour").onchange = colour;
