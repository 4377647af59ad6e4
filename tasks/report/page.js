// Draws every figure of the page in the colours of its theme, and again when the theme changes.
(function () {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const figures = JSON.parse(document.getElementById("figures").textContent);

  function themed(figure) {
    const css = getComputedStyle(document.documentElement);
    const colour = (name) => css.getPropertyValue(name).trim();
    const narrow = window.innerWidth < 560;
    const axis = { gridcolor: colour("--line"), zerolinecolor: colour("--soft"), linecolor: colour("--line"), automargin: true, zeroline: false };
    const scale = dark.matches
      ? [[0, "#1c2225"], [0.5, "#1d6b57"], [1, "#7ff0cb"]]
      : [[0, "#f4f7f5"], [0.5, "#6fb8a0"], [1, "#0b5f4a"]];
    const layout = structuredClone(figure.layout);
    for (const name of ["xaxis", "yaxis"]) layout[name] = { ...axis, ...(layout[name] || {}) };
    Object.assign(layout, {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: narrow ? 11 : 12, color: colour("--ink") },
      hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--ink") } },
      margin: { l: 8, r: 12, t: layout.showlegend ? 34 : 8, b: 8 }, autosize: true, dragmode: false,
    });
    const data = structuredClone(figure.data);
    for (const trace of data) if (trace.type === "heatmap") trace.colorscale = scale;
    return { data, layout };
  }

  function draw() {
    for (const [name, figure] of Object.entries(figures)) {
      const { data, layout } = themed(figure);
      Plotly.react(name, data, layout, { displayModeBar: false, responsive: true, scrollZoom: false });
    }
    document.documentElement.dataset.drawn = String(Object.keys(figures).length);
  }

  draw();
  dark.addEventListener("change", draw);
})();
