"use strict";
{
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const LINE = "var(--c1)", OTHERS = "var(--c2)";
  const tipStyle = { fill: "var(--card)", stroke: "var(--quiet)", fontSize: 13, lineHeight: 1.35, textPadding: 10 };

  const element = (name, properties = {}, ...children) => {
    const made = Object.assign(document.createElement(name), properties);
    made.append(...children);
    return made;
  };
  const cut = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);
  const bytes = (n) => (n >= 1e6 ? `${d3.format(".3~r")(n / 1e6)} MB` : n >= 1e3 ? `${d3.format(".3~r")(n / 1e3)} kB` : `${n} B`);

  /** Ticks as people say them, 1, 2 and 5 of each power of ten, as far as `most` have room; values and ticks are logarithms. */
  function decades([low, high], most) {
    const powers = d3.range(Math.floor(low), Math.ceil(high) + 1);
    const of = (steps, every) => powers.filter((e) => e % every === 0).flatMap((e) => steps.map((s) => e + Math.log10(s))).filter((v) => v >= low && v <= high);
    const all = [of([1, 2, 5], 1), of([1, 3], 1), ...[1, 2, 3, 5].map((every) => of([1], every))];
    return all.find((ticks) => ticks.length <= most) ?? all.at(-1);
  }
  const rounded = (logarithm) => +(10 ** logarithm).toPrecision(3);

  /** Draws into the figure, again whenever its width changes. `make(width)` returns what stands in it. */
  function draw(name, make) {
    const place = document.getElementById(`chart-${name}`);
    // Screen readers have the figure's caption, which names the table: of the marks of a chart they can make nothing.
    const body = element("div", { ariaHidden: "true" });
    place.replaceChildren(body);
    let last = 0;
    const again = () => last && body.replaceChildren(...make(last));
    new ResizeObserver(([entry]) => {
      const width = Math.round(entry.contentRect.width);
      if (width > 0 && width !== last) {
        last = width;
        again();
      }
    }).observe(body);
    return { place, again };
  }

  /** A place for the name of each dot at {px, py}: near it, where it covers least of the boxes that are `taken`. */
  function labels(dots, taken, size, [left, right, top, bottom]) {
    const covered = (a, b) => Math.max(0, Math.min(a[2], b[2]) - Math.max(a[0], b[0])) * Math.max(0, Math.min(a[3], b[3]) - Math.max(a[1], b[1]));
    return dots.map((d) => {
      const wide = d.text.length * size * 0.59, half = size * 0.62;
      const places = [["start", 10, 0], ["end", -10, 0], ["middle", 0, -14], ["middle", 0, 14], ...[12, 20, 28, 38].flatMap((far) => [["start", 9, -far], ["start", 9, far], ["end", -9, -far], ["end", -9, far], ["middle", 0, -far], ["middle", 0, far]])].map(([anchor, dx, dy]) => {
        const from = d.px + dx - { start: 0, middle: wide / 2, end: wide }[anchor];
        const box = [from, d.py + dy - half, from + wide, d.py + dy + half];
        const outside = box[0] < left || box[2] > right || box[1] < top || box[3] > bottom;
        return { anchor, dx, dy, box, cost: (outside ? 1e6 : 0) + d3.sum(taken, (t) => covered(t, box)) };
      });
      const place = d3.least(places, (p) => p.cost);
      taken.push(place.box);
      return { d, ...place };
    });
  }

  /** Boxes along a line from dot to dot, that names keep clear of. */
  function along(dots, half) {
    return d3.pairs(dots).flatMap(([a, b]) => d3.range(0, 1.0001, 0.05).map((t) => {
      const [x, y] = [a.px + t * (b.px - a.px), a.py + t * (b.py - a.py)];
      return [x - half, y - half, x + half, y + half];
    }));
  }

  function curve() {
    const finite = charts.curve.filter((p) => p.db !== null).map((p) => p.db);
    const [low, high] = finite.length ? d3.extent(finite) : [0, 1];
    const room = Math.max(high - low, 1);
    // What is the same as the original has no figure: it stands on a line of its own, above all others.
    const top = high + room * 0.16;
    const some = charts.curve.some((p) => p.db === null);
    const data = charts.curve.map((p) => ({ ...p, at: p.db ?? top, log: Math.log10(p.size) }));
    const line = d3.sort(data.filter((d) => d.calibrated && d.db !== null), (d) => d.size);
    const others = data.filter((d) => !d.calibrated);
    const [least, most] = d3.extent(data, (d) => d.log);
    const wide = Math.max(most - least, 0.1);
    const domain = [least - 0.06 * wide, most + 0.1 * wide];
    const range = [low - room * 0.1, (some ? top : high) + room * 0.06];
    draw("curve", (width) => {
      const height = Math.max(340, Math.min(480, width * 0.55)), left = width < 480 ? 46 : 58, font = width < 480 ? 12 : 13;
      const x = d3.scaleLinear(domain, [left, width - 16]), y = d3.scaleLinear(range, [height - 46, 34]);
      const dots = [...line, ...others].map((d) => ({ ...d, px: x(d.log), py: y(d.at) }));
      const taken = [...dots.map((d) => [d.px - 7, d.py - 7, d.px + 7, d.py + 7]), ...along(dots.slice(0, line.length), 5)];
      const named = dots.slice(line.length).map((d) => ({ ...d, text: cut(d.name, 20) }));
      const middle = dots[Math.floor(line.length / 2)];
      const placed = labels([...(line.length ? [{ ...middle, text: "calibrated", line: true }] : []), ...named], taken, font, [left, width, 0, height - 46]);
      const channels = { x: "log", y: "at" };
      const ticks = d3.ticks(low, high, 6);
      return [Plot.plot({
        width, height, marginLeft: left, marginRight: 16, marginTop: 34, marginBottom: 46,
        style: { fontSize: "12px", background: "transparent" },
        x: { domain, label: "Size of the file →", labelAnchor: "right", ticks: decades(domain, width / 75), tickFormat: (v) => bytes(rounded(v)), grid: true },
        y: { domain: range, label: "↑ PSNR (dB)", ticks: some ? [...ticks, top] : ticks, tickFormat: (v) => (some && v === top ? (width < 480 ? "same" : "identical") : d3.format("~r")(v).replace("-", "−")), grid: true },
        marks: [
          Plot.line(line, { ...channels, stroke: LINE, strokeWidth: 2.5 }),
          Plot.dot(line, { ...channels, fill: LINE, r: 5 }),
          Plot.dot(others, { ...channels, fill: OTHERS, symbol: "square", r: 5.5 }),
          ...placed.map(({ d, anchor, dx, dy }) => Plot.text([d], { ...channels, text: "text", textAnchor: anchor, dx, dy, fontSize: font, fontWeight: 600, fill: d.line ? LINE : "currentColor", stroke: "var(--card)", strokeWidth: 4 })),
          Plot.tip(data, Plot.pointer({ ...channels, title: "words", maxRadius: 60, ...tipStyle })),
        ],
      })];
    });
  }

  /** Two panels with the same rows: bits per weight, and sensitivity on a logarithmic scale. */
  function layers() {
    let shown = charts.layers[charts.first];
    const details = charts.layers.map((_, n) => document.getElementById(`layers-${n}`));
    const drawn = draw("layers", (width) => {
      const { bars, more } = shown;
      const beside = width >= 640;
      const widths = beside ? [Math.floor((width - 24) * 0.6), Math.floor((width - 24) * 0.4)] : [width, width];
      const left = Math.min(widths[0] * 0.42, 16 + 7.2 * d3.max(bars, (b) => b.name.length));
      const rows = bars.map((b, n) => ({ ...b, row: n, log: b.sensitivity > 0 ? Math.log10(b.sensitivity) : null }));
      const most = d3.max(charts.layers.flatMap((l) => l.bars), (b) => b.bits) || 1;
      const known = rows.filter((r) => r.log !== null);
      const [low, high] = d3.extent(charts.layers.flatMap((l) => l.bars).filter((b) => b.sensitivity > 0), (b) => Math.log10(b.sensitivity));
      const common = { height: rows.length * 28 + 54, marginTop: 8, marginBottom: 42, style: { fontSize: "12px", background: "transparent" } };
      const names = (room) => ({ type: "band", domain: d3.range(rows.length), label: null, tickFormat: (n) => cut(rows[n].name, Math.floor(room / 7.2)), tickSize: 0, padding: 0.25 });
      const blank = { type: "band", domain: d3.range(rows.length), axis: null, padding: 0.25 };
      const panels = [Plot.plot({
        ...common, width: widths[0], marginLeft: left, marginRight: 44,
        x: { domain: [0, most], label: "Bits per weight →", grid: true, ticks: Math.max(2, Math.floor(widths[0] / 110)) },
        y: names(left),
        marks: [
          Plot.barX(rows, { x: "bits", y: "row", fill: LINE }),
          Plot.text(rows, { x: "bits", y: "row", text: (r) => r.bits.toFixed(2), textAnchor: "start", dx: 5, fill: "currentColor" }),
          Plot.tip(rows, Plot.pointerY({ x: "bits", y: "row", title: "words", anchor: "right", ...tipStyle })),
        ],
      })];
      if (known.length) {
        const edge = beside ? 8 : left, domain = [low - 0.15, high + 0.15];
        panels.push(Plot.plot({
          ...common, width: widths[1], marginLeft: edge, marginRight: 20,
          x: { domain, label: "Sensitivity →", grid: true, ticks: decades(domain, widths[1] / 60), tickFormat: (v) => d3.format(v >= -3 && v < 5 ? "~r" : ".0e")(rounded(v)).replace("-", "−") },
          y: beside ? blank : names(edge),
          marks: [
            Plot.ruleY(rows, { y: "row", stroke: "currentColor", strokeOpacity: 0.1 }),
            Plot.dot(known, { x: "log", y: "row", fill: OTHERS, r: 5.5 }),
            Plot.tip(known, Plot.pointerY({ x: "log", y: "row", title: "words", anchor: "right", ...tipStyle })),
          ],
        }));
      }
      return [
        element("div", { className: "panels" }, ...panels.map((panel) => element("div", {}, panel))),
        ...(more ? [element("p", { className: "quiet" }, `and ${more} tensors that take fewer bytes`)] : []),
      ];
    });
    const select = element("select", {}, ...charts.layers.map((l, n) => element("option", { value: n, selected: n === charts.first }, l.label)));
    select.addEventListener("change", () => {
      shown = charts.layers[select.value];
      details.forEach((d, n) => { d.open = n === Number(select.value); });
      drawn.again();
    });
    drawn.place.prepend(element("div", { className: "controls" }, element("label", {}, "Calibrated at: ", select)));
  }

  if (charts.curve.length) curve();
  if (charts.layers.length) layers();
}
