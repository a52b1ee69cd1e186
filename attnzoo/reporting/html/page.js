// Draws the charts, hides contenders, and sorts the tables. The data is in the element #data.
(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("data").textContent);
  const names = data.series.map(([name]) => name);
  const colours = data.series.map(([, colour]) => colour);
  const hidden = new Set();
  const dark = matchMedia("(prefers-color-scheme: dark)");

  const theme = () => {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const text = colour("--text"), soft = colour("--soft"), line = colour("--line");
    return {
      background: null,
      font: getComputedStyle(document.body).fontFamily,
      view: { stroke: null },
      rule: { color: text },
      axis: { labelColor: soft, titleColor: soft, gridColor: line, domainColor: line, tickColor: line,
        labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal", gridOpacity: 0.7 },
    };
  };

  const themed = (spec) => {
    const values = spec.data.values.filter((record) => !hidden.has(record.series));
    const whole = { ...spec, data: { values }, width: "container", config: theme(),
      autosize: { type: "fit-x", contains: "padding", resize: true } };
    return JSON.parse(JSON.stringify(whole), (key, value) =>
      key === "color" && value && value.field === "series"
        ? { ...value, scale: { domain: names, range: colours } } : value);
  };

  const views = new Map();
  const draw = () => {
    for (const element of document.querySelectorAll("[data-chart]")) {
      const spec = themed(data.specs[Number(element.dataset.chart)]);
      views.get(element)?.finalize();
      views.delete(element);
      element.replaceChildren();
      element.classList.toggle("empty", spec.data.values.length === 0);
      if (spec.data.values.length === 0) continue;
      window.vegaEmbed(element, spec, { actions: false, renderer: "svg", tooltip: { theme: dark.matches ? "dark" : "light" } })
        .then((result) => views.set(element, result))
        .catch((error) => { element.textContent = `This chart cannot be drawn: ${error.message}`; });
    }
  };

  for (const swatch of document.querySelectorAll(".swatch")) {
    swatch.style.background = colours[Number(swatch.dataset.series)];
  }
  for (const box of document.querySelectorAll("input[data-series]")) {
    box.addEventListener("change", () => {
      const name = names[Number(box.dataset.series)];
      if (box.checked) hidden.delete(name); else hidden.add(name);
      for (const row of document.querySelectorAll("tr[data-name]")) row.hidden = hidden.has(row.dataset.name);
      draw();
    });
  }

  const compare = (a, b) => {
    if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
    const [x, y] = [Number(a), Number(b)];
    return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b) : x - y;
  };
  for (const box of document.querySelectorAll(".tablebox")) {
    const body = box.querySelector("tbody"), heads = [...box.querySelectorAll("th")];
    const rows = [...body.rows], select = box.querySelector("select");
    let column = null, factor = 1;
    const sort = () => {
      const key = (row) => row.cells[column].dataset.order;
      const sorted = column === null ? [...rows] : [...rows].sort((a, b) => {
        const missing = (key(a) === undefined) - (key(b) === undefined);  // always last, in both directions
        return missing || factor * compare(key(a), key(b));
      });
      body.replaceChildren(...sorted);
      heads.forEach((head, number) => head.setAttribute("aria-sort",
        number !== column ? "none" : factor > 0 ? "ascending" : "descending"));
      select.value = column === null ? "" : String(column);
    };
    heads.forEach((head, number) => head.querySelector("button").addEventListener("click", () => {
      factor = column === number ? -factor : 1;
      column = number;
      sort();
    }));
    select.addEventListener("change", () => { column = select.value === "" ? null : Number(select.value); factor = 1; sort(); });
    box.querySelector(".direction").addEventListener("click", () => { factor = -factor; sort(); });
  }

  dark.addEventListener("change", draw);
  draw();
})();
