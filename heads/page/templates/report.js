"use strict";
{
  const byId = (id) => document.getElementById(id);

  // theme: as the system, dark, light
  const themes = ["", "dark", "light"], names = ["as the system", "dark", "light"];
  const theme = byId("theme");
  let chosen = 0;
  theme.hidden = false;
  theme.addEventListener("click", () => {
    chosen = (chosen + 1) % themes.length;
    if (themes[chosen]) document.documentElement.dataset.theme = themes[chosen];
    else delete document.documentElement.dataset.theme;
    theme.querySelector("span").textContent = names[chosen];
  });

  // on paper everything is open
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = closed.concat([...document.querySelectorAll("details:not([open])")]);
    for (const one of closed) one.open = true;
  });
  addEventListener("afterprint", () => {
    for (const one of closed) one.open = false;
    closed = [];
  });

  const bytesOf = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const unpacked = async (id) => {
    const stream = new Blob([bytesOf(byId(id).textContent)]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  };

  const loadLibrary = async () => {
    const script = document.createElement("script");
    script.src = URL.createObjectURL(new Blob([await unpacked("data-library")], { type: "text/javascript" }));
    await new Promise((done, failed) => { script.onload = done; script.onerror = failed; document.head.append(script); });
  };

  // {points, faces, grey}: a line of JSON with their sizes, then their bytes
  const loadMesh = async () => {
    const bytes = await unpacked("data-mesh"), end = bytes.indexOf(10);
    const sizes = JSON.parse(new TextDecoder().decode(bytes.subarray(0, end)));
    const parts = {};
    let start = end + 1;
    for (const [name, size] of Object.entries(sizes)) parts[name] = bytes.slice(start, (start += size));
    return { points: new Float32Array(parts.points.buffer), faces: new Uint32Array(parts.faces.buffer), grey: parts.grey };
  };

  const coloursOf = (map, grey) => {
    const numbers = bytesOf(map.values), colours = new Uint8Array(4 * numbers.length);
    numbers.forEach((number, point) => {
      const rgb = number === 255 ? [grey[point], grey[point], grey[point]] : map.palette[number];
      colours.set([...rgb, 255], 4 * point);
    });
    return colours;
  };

  const startViewer = async () => {
    const canvas = byId("cortex"), select = byId("map"), view = byId("view");
    await loadLibrary();
    const mesh = await loadMesh(), maps = JSON.parse(new TextDecoder().decode(await unpacked("data-maps")));
    const viewer = new niivue.Niivue({ show3Dcrosshair: false, isColorbar: false, isResizeCanvas: true, dragAndDropEnabled: false, backColor: [0, 0, 0, 0], logLevel: "error" });
    await viewer.attachToCanvas(canvas);
    const cortex = new niivue.NVMesh(mesh.points, mesh.faces, "cortex", coloursOf(maps[0], mesh.grey), 1, true, viewer.gl);
    viewer.addMesh(cortex);
    viewer.setSliceType(viewer.sliceTypeRender);

    const ground = () => {
      const [r, g, b] = getComputedStyle(canvas.closest("figure")).backgroundColor.match(/\d+/g).map((part) => part / 255);
      viewer.opts.backColor = [r, g, b, 1];
      viewer.drawScene();
    };
    const show = () => {
      cortex.rgba255 = coloursOf(maps[select.value], mesh.grey);
      cortex.updateMesh(viewer.gl);
      viewer.drawScene();
      for (const legend of document.querySelectorAll(".legend-of")) legend.hidden = legend.dataset.map !== select.value;
      canvas.setAttribute("aria-label", `${maps[select.value].title}, on the inflated cortex, which can be turned with the arrow keys`);
      canvas.dataset.map = select.value;
    };
    const look = () => { if (view.value) viewer.setRenderAzimuthElevation(...view.value.split(",").map(Number)); };
    const turn = (sideways, upwards) => {
      viewer.setRenderAzimuthElevation(viewer.scene.renderAzimuth + sideways, viewer.scene.renderElevation + upwards);
      view.value = "";
    };
    const keys = { ArrowLeft: [-10, 0], ArrowRight: [10, 0], ArrowUp: [0, 10], ArrowDown: [0, -10] };
    const zoom = { "+": 1.15, "-": 1 / 1.15 };
    const typed = (event) => {
      event.stopPropagation(); // niivue has keys of its own, for volumes
      if (event.type === "keydown" && keys[event.key]) { turn(...keys[event.key]); event.preventDefault(); }
      if (event.type === "keydown" && zoom[event.key]) viewer.setScale(viewer.scene.volScaleMultiplier * zoom[event.key]);
    };
    for (const kind of ["keydown", "keyup", "keypress"]) canvas.parentElement.addEventListener(kind, typed, true);
    canvas.addEventListener("pointerup", () => { view.value = ""; });
    select.addEventListener("change", show);
    view.addEventListener("change", look);
    theme.addEventListener("click", ground);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", ground);
    viewer.setScale(1.35); ground(); show(); look();
    byId("viewer-note").remove();
    byId("viewer").dataset.ready = "yes";
  };
  if (byId("cortex")) {
    byId("viewer-note").textContent = "The viewer is starting ...";
    startViewer().catch((error) => { byId("viewer-note").textContent = `The viewer needs WebGL 2, and did not start (${error.message || error}); the pictures below show the same maps.`; });
  }
}
