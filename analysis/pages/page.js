// Tables that sort, charts, chips that show and hide arms, and the colours of what Bokeh paints.
"use strict";

for (const table of document.querySelectorAll(".scroll table")) {
  table.querySelectorAll("thead th").forEach((head, column) => head.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    table.querySelectorAll("thead th").forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const missing = text => text === "-" ? "Infinity" : text;
    const key = row => row.cells[column].dataset.value ?? missing(row.cells[column].textContent);
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const [x, y] = [key(a), key(b)], difference = x - y, last = (x === "Infinity") - (y === "Infinity");
      const order = Number.isNaN(difference) ? x.localeCompare(y, undefined, { numeric: true }) : difference;
      return last || order * (down ? -1 : 1);
    });
    table.tBodies[0].append(...rows);
  }));
}

async function unpacked(name) {
  const bytes = Uint8Array.from(atob(document.getElementById(name).textContent), letter => letter.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"))).text();
}

async function showCharts() {
  const library = document.createElement("script");
  library.textContent = await unpacked("library");
  document.head.append(library);
  const { document: doc, places } = JSON.parse(await unpacked("charts"));
  document.body.dataset.charts = "drawing"; // The still figures make room: Bokeh draws only what has a width.
  const [views] = await Bokeh.embed.embed_items({ doc }, [{ docid: "doc", roots: places, root_ids: Object.keys(places) }]);
  const models = [...Bokeh.documents.at(-1).all_models];
  const tagged = tag => models.filter(model => model.tags.includes(tag));

  // What stands for the baseline has the colour of the page's text; axes and grids follow --bk- properties when painted.
  const paint = () => {
    const ink = getComputedStyle(document.documentElement).getPropertyValue("--ink").trim();
    for (const renderer of tagged("ink"))
      for (const glyph of [renderer.glyph, renderer.nonselection_glyph, renderer.selection_glyph, renderer.hover_glyph])
        for (const name of ["line_color", "fill_color"])
          if (glyph?.properties?.[name] !== undefined) glyph[name] = { value: ink };
    for (const root of views.roots) root.request_repaint?.();
  };
  paint();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);

  const chips = [...document.querySelectorAll(".chips [data-arm]")];
  const show = (chip, on) => {
    chip.setAttribute("aria-pressed", on);
    for (const renderer of tagged(`arm-${chip.dataset.arm}`)) renderer.visible = on;
  };
  for (const chip of chips) {
    chip.addEventListener("click", () => show(chip, chip.getAttribute("aria-pressed") === "false"));
    chip.addEventListener("dblclick", () => chips.forEach(other => show(other, other === chip)));
  }
  for (const button of document.querySelectorAll(".chips [data-all]"))
    button.addEventListener("click", () => chips.forEach(chip => show(chip, button.dataset.all === "1")));
  for (const select of document.querySelectorAll("select[data-panels]"))
    select.addEventListener("change", () => {
      for (const option of select.options)
        for (const renderer of tagged(`panel-${option.value}`)) renderer.visible = option.selected;
    });
  document.body.dataset.charts = "shown";
}

if (document.getElementById("charts") !== null)
  showCharts().catch(error => {
    delete document.body.dataset.charts; // The still figures come back.
    throw error;
  });
