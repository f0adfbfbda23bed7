"use strict";
// Stacked areas over the last two minutes, as SVG.

const CHART_S = 120, CHART_WIDTH = 400, CHART_HEIGHT = 100;
const svg = (tag, attributes) => {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes || {})) element.setAttribute(name, value);
  return element;
};

class Chart {
  // series: [{ name, colour }], from the bottom up; unit: written after the largest value.
  constructor(parent, title, series, unit = "", fixedTop = null) {
    this.series = series; this.unit = unit; this.fixedTop = fixedTop; this.points = [];
    const figure = document.createElement("figure"), caption = document.createElement("figcaption");
    figure.className = "chart"; caption.className = "small";
    const name = document.createElement("b");
    name.textContent = title;
    caption.append(name);
    this.labels = series.map(each => {
      const label = document.createElement("span"), mark = document.createElement("i"), text = document.createElement("span");
      mark.style.background = each.colour;
      label.append(mark, text); caption.append(label);
      return text;
    });
    this.svg = svg("svg", { viewBox: `0 0 ${CHART_WIDTH} ${CHART_HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": title });
    this.grid = svg("line", { x1: 0, x2: CHART_WIDTH, y1: 1, y2: 1, stroke: "var(--line)", "vector-effect": "non-scaling-stroke" });
    const axis = svg("line", { x1: 0, x2: CHART_WIDTH, y1: CHART_HEIGHT - 1, y2: CHART_HEIGHT - 1, stroke: "var(--soft)", "vector-effect": "non-scaling-stroke" });
    this.areas = series.map(each => svg("polygon", { fill: each.colour, "fill-opacity": .85 }));
    this.svg.append(this.grid, ...this.areas, axis);
    this.top = document.createElement("div"); this.top.className = "small";
    figure.append(caption, this.top, this.svg);
    parent.append(figure);
  }

  add(second, values) {
    this.points.push({ second, values });
    while (this.points.length && this.points[0].second < second - CHART_S) this.points.shift();
    this.draw(second);
  }

  draw(now) {
    const total = point => point.values.reduce((a, b) => a + b, 0);
    const top = this.fixedTop ?? Math.max(1, ...this.points.map(total));
    const x = point => CHART_WIDTH - (now - point.second) * CHART_WIDTH / CHART_S;
    const y = value => CHART_HEIGHT - 1 - Math.min(value / top, 1) * (CHART_HEIGHT - 2);
    const below = this.points.map(() => 0);
    this.areas.forEach((area, index) => {
      const lower = this.points.map((point, i) => `${x(point).toFixed(1)},${y(below[i]).toFixed(1)}`);
      this.points.forEach((point, i) => { below[i] += point.values[index]; });
      const upper = this.points.map((point, i) => `${x(point).toFixed(1)},${y(below[i]).toFixed(1)}`);
      area.setAttribute("points", [...lower, ...upper.reverse()].join(" "));
    });
    const last = this.points[this.points.length - 1];
    const written = value => `${new Intl.NumberFormat("en", { maximumFractionDigits: 1 }).format(value)}${this.unit}`;
    this.top.textContent = `top: ${written(top)}`;
    this.series.forEach((each, index) => { this.labels[index].textContent = `${each.name} ${written(last.values[index])}`; });
  }
}
