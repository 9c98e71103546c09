"""The look of the report page and the few lines of script that read values off its charts.

Both stand in the page itself, which asks no server for anything. Without script all is there but the read-out.
"""

STYLE = """
:root { color-scheme: light dark;
  --page: #faf9f7; --card: #ffffff; --ink: #1d1c1a; --soft: #6d6963; --hair: #e5e1da; --faint: #f2efea;
  --good: #1f8a54; --warn: #b26a00; --bad: #c0392b;
  --c0: #2a5bd7; --c1: #d9672b; --c2: #17936a; --c3: #8b55d0; --c4: #c8457f; --c5: #7a7f18; }
@media (prefers-color-scheme: dark) { :root {
  --page: #131416; --card: #1b1d20; --ink: #ececea; --soft: #9d9b96; --hair: #303338; --faint: #24272b;
  --good: #4cc38a; --warn: #e0a64a; --bad: #f0766a;
  --c0: #7aa2ff; --c1: #ff9d66; --c2: #4fd1a1; --c3: #c09bff; --c4: #ff87b7; --c5: #cfd25c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 64px; }
header { margin-bottom: 28px; }
h1 { font-size: clamp(26px, 5vw, 38px); line-height: 1.15; letter-spacing: -.02em; margin: 2px 0 10px;
  overflow-wrap: anywhere; }
h2 { font-size: 18px; letter-spacing: -.01em; margin: 44px 0 14px; }
h2 small { font-weight: 400; font-size: 14px; color: var(--soft); margin-left: 8px; letter-spacing: 0; }
.over { margin: 0; color: var(--soft); font-size: 13px; letter-spacing: .08em; text-transform: uppercase; }
.facts { margin: 0; color: var(--soft); }
.facts span + span::before { content: "·"; margin: 0 .5em; }
.state { display: inline-block; border-radius: 99px; padding: 1px 11px; font-size: 13px; font-weight: 600;
  color: var(--card); background: var(--soft); vertical-align: .45em; margin-left: 12px; letter-spacing: 0;
  line-height: 1.6; white-space: nowrap; }
.state.completed { background: var(--good); } .state.preempted, .state.running { background: var(--warn); }
.state.fatal, .state.crashed { background: var(--bad); }
.notice { border-left: 3px solid var(--warn); background: var(--card); margin: 14px 0 0; padding: 8px 14px;
  border-radius: 0 6px 6px 0; overflow-wrap: anywhere; }
.notice.bad { border-color: var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(134px, 1fr)); gap: 12px; }
.tile, .chart, .card { background: var(--card); border: 1px solid var(--hair); border-radius: 10px; }
.tile { padding: 12px 13px 13px; }
.tile span { display: block; color: var(--soft); font-size: 13px; }
.tile b + span { font-size: 12px; }
.tile b { display: block; font-size: 25px; line-height: 1.3; letter-spacing: -.02em; font-weight: 620; }
.tile b small { font-size: 14px; font-weight: 500; letter-spacing: 0; color: var(--soft); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 250px), 1fr)); gap: 12px; }
.chart.wide + .charts, .charts + .charts { margin-top: 12px; }
.chart { margin: 0; padding: 12px 16px 26px; min-width: 0; display: flex; flex-direction: column; }
figcaption { font-size: 13px; padding-bottom: 10px; overflow-wrap: anywhere; }
figcaption b { display: block; font-size: 14px; }
.legend { color: var(--soft); }
.key { display: inline-block; margin-right: 14px; }
.key i { font-style: normal; color: var(--ink); }
.key::before { content: ""; display: inline-block; width: 12px; border-top: 3px solid; border-radius: 2px;
  vertical-align: .28em; margin-right: 6px; }
.key.dashed::before { border-top-style: dotted; }
.plot { position: relative; height: 170px; margin: auto 6px 0 42px; touch-action: pan-y; }
.wide .plot { height: 250px; }
.plot svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: hidden; }
.plot svg.dotted { overflow: visible; }
.plot path, .spark path { fill: none; vector-effect: non-scaling-stroke; }
.grid { stroke: var(--hair); stroke-width: 1; }
.line { stroke: currentColor; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.line.dashed { stroke-width: 1.5; stroke-dasharray: 2 5; }
.raw { stroke: currentColor; stroke-width: 1; opacity: .32; }
.plot .band { fill: currentColor; opacity: .2; }
.dot { stroke: currentColor; stroke-width: 7; stroke-linecap: round; }
.resumed { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 4 4; }
.skipped { stroke: var(--bad); stroke-width: 2; }
.c0.key::before { border-color: var(--c0); } .c1.key::before { border-color: var(--c1); }
.c2.key::before { border-color: var(--c2); } .c3.key::before { border-color: var(--c3); }
.c4.key::before { border-color: var(--c4); } .c5.key::before { border-color: var(--c5); }
path.c0 { color: var(--c0); } path.c1 { color: var(--c1); } path.c2 { color: var(--c2); }
path.line.dashed { color: var(--soft); } .key.dashed::before { border-color: var(--soft); }
path.c3 { color: var(--c3); } path.c4 { color: var(--c4); } path.c5 { color: var(--c5); }
.plot span { position: absolute; color: var(--soft); font-size: 11.5px; line-height: 1; white-space: nowrap; }
.plot .y { right: calc(100% + 7px); transform: translateY(-50%); }
.plot .x { top: calc(100% + 7px); transform: translateX(-50%); }
.plot .cursor { top: 0; bottom: 0; width: 1px; background: var(--soft); pointer-events: none; }
.plot .readout { top: 4px; padding: 6px 9px; background: var(--card); color: var(--ink); line-height: 1.5;
  border: 1px solid var(--hair); border-radius: 6px; box-shadow: 0 2px 10px #0002; pointer-events: none; z-index: 1;
  white-space: pre; }
.scroll { overflow-x: auto; }
.tables { display: flex; flex-wrap: wrap; align-items: start; gap: 12px; margin-bottom: 12px; }
.tables .card { flex: 1 1 auto; max-width: 100%; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: right; padding: 7px 14px; border-top: 1px solid var(--hair); white-space: nowrap; }
thead th { border-top: 0; color: var(--soft); font-weight: 500; font-size: 13px; }
th:first-child, td:first-child { text-align: left; } td.left, th.left { text-align: left; white-space: normal; }
td small { color: var(--soft); }
.spark { width: 110px; height: 22px; display: block; margin-left: auto; overflow: visible; }
.spark .line { stroke-width: 1.5; }
.strips { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 360px), 1fr)); gap: 12px; }
.strips figure { margin: 0; padding: 12px; }
.strips img { display: block; width: 100%; border-radius: 4px; }
.strips figcaption { margin-top: 8px; font-size: 12px; color: var(--soft); overflow-wrap: anywhere; }
.found { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); gap: 12px; }
.found .card { padding: 12px 16px 14px; }
.found p { margin: 0 0 10px; font-size: 14px; line-height: 1.4; min-height: 2.8em; }
.found ol { display: grid; grid-template-columns: repeat(5, 1fr); gap: 7px; list-style: none; margin: 0; padding: 0; }
.found li { font-size: 11.5px; color: var(--soft); text-align: center; min-width: 0; }
.found img, .found .lost { display: block; width: 100%; aspect-ratio: 1; object-fit: cover; border-radius: 6px;
  background: var(--faint); margin-bottom: 3px; }
.found .right img, .found .right .lost { outline: 3px solid var(--good); outline-offset: 1px; }
.found .right { color: var(--good); font-weight: 600; }
.verdict { color: var(--soft); } .verdict.good { color: var(--good); }
.span { position: relative; height: 14px; background: var(--faint); border-radius: 4px; margin: 14px 16px 10px; }
.span i { position: absolute; top: 0; bottom: 0; min-width: 3px; border-radius: 4px; background: var(--c0); }
.span i.last { background: var(--good); }
details { padding: 10px 16px; } summary { cursor: pointer; font-weight: 500; }
pre { margin: 10px 0 4px; overflow-x: auto; font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.empty { color: var(--soft); margin: 0; }
footer { margin-top: 48px; color: var(--soft); font-size: 13px; }
@media (max-width: 560px) { main { padding: 24px 14px 40px; } .tile { padding: 10px 12px; }
  .tile b { font-size: 21px; }  .tiles { grid-template-columns: repeat(2, 1fr); gap: 8px; } th, td { padding: 7px 9px; }
  .chart { padding: 10px 12px 26px; }
  .wide .plot { height: 190px; } .state { margin-left: 8px; } }
.cut-off main { opacity: .5; }
.cut-off main::before { content: "The server does not answer; this is what it last said."; color: var(--bad); }
a { color: var(--c0); } td .state { margin-left: 0; vertical-align: baseline; }
@media print { .chart, .card, .tile { break-inside: avoid; } }
"""

SCRIPT = """
function wire() { for (const plot of document.querySelectorAll(".plot")) {
  const data = JSON.parse(plot.dataset.plot), cursor = document.createElement("span");
  const readout = document.createElement("span");
  cursor.className = "cursor"; readout.className = "readout";
  const nearest = (xs, x) => xs.reduce((best, at, i) => Math.abs(at - x) < Math.abs(xs[best] - x) ? i : best, 0);
  plot.addEventListener("pointermove", event => {
    const box = plot.getBoundingClientRect(), place = (event.clientX - box.left) / box.width;
    if (place < 0 || place > 1) return;
    const step = data.first + place * (data.last - data.first), first = data.series[0];
    const at = first.x[nearest(first.x, step)];
    const lines = data.series.map(one => one.name + "  " + one.y[nearest(one.x, at)] + data.unit);
    readout.textContent = ["step " + at.toLocaleString("en"), ...lines].join("\\n");
    const shown = 100 * (at - data.first) / Math.max(1, data.last - data.first);
    cursor.style.left = shown + "%";
    readout.style.left = shown < 55 ? `calc(${shown}% + 8px)` : "auto";
    readout.style.right = shown < 55 ? "auto" : `calc(${100 - shown}% + 8px)`;
    plot.append(cursor, readout);
  });
  plot.addEventListener("pointerleave", () => { cursor.remove(); readout.remove(); });
} }
wire();
"""

LIVE_SCRIPT = """
let seen = "";
setInterval(async () => {
  const answer = await fetch(location.href).catch(() => null);
  document.body.classList.toggle("cut-off", !answer);
  if (!answer || !answer.ok || document.querySelector(".cursor")) return;
  const text = await answer.text();
  if (text === seen) return;
  seen = text;
  const open = [...document.querySelectorAll("details")].map(one => one.open);
  document.querySelector("main").replaceWith(new DOMParser().parseFromString(text, "text/html").querySelector("main"));
  document.querySelectorAll("details").forEach((one, i) => { one.open = open[i]; });
  wire();
}, 5000);
"""
"""Takes in what has changed, and leaves the page's place, its open parts and a chart that is being read alone."""
