const element = id => document.getElementById(id);
const config = JSON.parse(element("config").textContent);
const low = config.size / config.source_scale;  // pixels on a side of the source as it comes
const cell = Math.max(1, Math.round(512 / low));  // pixels of the drawing on a side of each of them

// ------------------------------------------------------------------ the drawing: a list of steps, drawn anew each time

const board = element("board"), pen = board.getContext("2d", { willReadFrequently: true });
board.width = board.height = low * cell;
const steps = [];  // { fresh: on white paper?, path, colour, width } or { fresh, picture }; examples have { example: true }
let stroke = null, colour = "#000", example = 0;

function redraw() {
  for (const step of [{ fresh: true }, ...steps]) {
    if (step.fresh) {
      pen.fillStyle = "#fff";
      pen.fillRect(0, 0, board.width, board.height);
    }
    if (step.path) {
      Object.assign(pen, { strokeStyle: step.colour, lineWidth: step.width, lineCap: "round", lineJoin: "round" });
      pen.stroke(step.path);
    }
    if (step.picture) {  // all of it, in the middle
      const { naturalWidth: width, naturalHeight: height } = step.picture;
      const scale = board.width / Math.max(width, height), [w, h] = [width * scale, height * scale];
      Object.assign(pen, { imageSmoothingEnabled: scale < 1, imageSmoothingQuality: "high" });
      pen.drawImage(step.picture, (board.width - w) / 2, (board.height - h) / 2, w, h);
    }
  }
  element("undo").disabled = element("clear").disabled = steps.length === 0;
  changed();
}

function add(step) {
  steps.push(step);
  redraw();
}

async function addPicture(url, example = false) {
  const picture = new Image();
  picture.src = url;
  await picture.decode();
  add({ fresh: true, picture, example });
}

function addExample() {
  const one = config.examples[example++ % config.examples.length];
  if (one.startsWith("data:")) return addPicture(one, true);
  const path = new Path2D(), scale = board.width / 72;
  path.addPath(new Path2D(one), new DOMMatrix([scale, 0, 0, scale, 0, 0]));
  add({ fresh: true, path, colour: "#000", width: 2 * scale, example: true });
}

function undo() {
  steps.pop();
  redraw();
}

function place(event) {
  const box = board.getBoundingClientRect(), scale = board.width / box.width;
  return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
}

board.addEventListener("pointerdown", event => {
  if (event.button || stroke) return;
  board.setPointerCapture(event.pointerId);
  const fresh = Boolean(steps.at(-1)?.example) && colour === "#000";  // a drawing of one's own takes the example's place
  const width = element("width").value * board.width / 72;
  stroke = { path: new Path2D(), colour, width, fresh, pointer: event.pointerId };
  stroke.path.moveTo(...place(event));
  stroke.path.lineTo(...place(event));  // a dot, so far
  add(stroke);
});
board.addEventListener("pointermove", event => {
  if (stroke?.pointer !== event.pointerId) return;
  const parts = event.getCoalescedEvents?.() ?? [];
  for (const part of parts.length ? parts : [event]) stroke.path.lineTo(...place(part));
  redraw();
});
for (const end of ["pointerup", "pointercancel"])
  board.addEventListener(end, event => { if (stroke?.pointer === event.pointerId) stroke = null; });

for (const [tool, paint] of [["brush", "#000"], ["eraser", "#fff"]])
  element(tool).addEventListener("click", () => {
    colour = paint;
    for (const other of ["brush", "eraser"]) element(other).setAttribute("aria-pressed", other === tool);
  });
element("undo").addEventListener("click", undo);
element("clear").addEventListener("click", () => add({ fresh: true }));
element("example").addEventListener("click", addExample);
element("example").hidden = config.examples.length === 0;
element("open").addEventListener("change", event => {
  const [file] = event.target.files;
  if (file) addPicture(URL.createObjectURL(file)).catch(() => fail(`${file.name}: not a picture that this browser reads`));
  event.target.value = "";
});
addEventListener("keydown", event => {
  if ((event.ctrlKey || event.metaKey) && event.key === "z" && steps.length) undo();
});

// ------------------------------------------------------------------ the student

const result = element("result"), print = result.getContext("2d");
result.width = result.height = config.size;
let ort, session, seed = 1, took = 0, isWanted = false, isRunning = false;

/** The drawing as the student sees it: (3, size, size) in [-1, 1], of 256 levels, as in a file. */
function source() {
  const { data } = pen.getImageData(0, 0, board.width, board.height);
  const { size, source_scale: scale } = config, x = new Float32Array(3 * size * size);
  for (let c = 0; c < 3; c++)
    for (let i = 0; i < low; i++)
      for (let j = 0; j < low; j++) {
        let sum = 0;
        for (let y = i * cell; y < (i + 1) * cell; y++)
          for (let x = j * cell; x < (j + 1) * cell; x++) sum += data[4 * (y * board.width + x) + c];
        const level = Math.round(sum / (cell * cell)) / 127.5 - 1;
        for (let y = i * scale; y < (i + 1) * scale; y++) {
          const first = (c * size + y) * size + j * scale;
          x.fill(level, first, first + scale);
        }
      }
  return x;
}

/** Standard normal numbers (Box–Muller, on the generator mulberry32), the same for the same seed. */
function normals(count, seed) {
  const uniform = () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let n = Math.imul(seed ^ (seed >>> 15), seed | 1);
    n ^= n + Math.imul(n ^ (n >>> 7), n | 61);
    return (((n ^ (n >>> 14)) >>> 0) + 0.5) / 2 ** 32;
  };
  return Float32Array.from({ length: count }, () =>
    Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform()));
}

async function translate() {
  const inputs = {};
  Object.entries(config.inputs).forEach(([name, shape], i) => {
    const count = shape.reduce((a, b) => a * b, 1);
    inputs[name] = new ort.Tensor("float32", name === "x_T" ? source() : normals(count, seed + 7919 * i), shape);
  });
  const began = performance.now();
  const { x_0 } = await session.run(inputs);
  took = performance.now() - began;
  const { size } = config, pixels = print.createImageData(size, size);
  for (let i = 0; i < size * size; i++) {
    for (let c = 0; c < 3; c++) pixels.data[4 * i + c] = (x_0.data[c * size * size + i] + 1) * 127.5;  // rounds
    pixels.data[4 * i + 3] = 255;
  }
  print.putImageData(pixels, 0, 0);
  window.ibmd = { inputs, x_0 };  // of the result that is shown: to look at in the console
  say("ready", `${config.size}×${config.size} pixels in ${took.toFixed(0)} ms. All of it happens in this page.`);
}

/** Translate what is drawn: once for all that changes while the student is at work, and leave time to draw. */
async function changed() {
  isWanted = true;
  if (isRunning || !session) return;
  isRunning = true;
  result.ariaBusy = "true";
  try {
    while (isWanted) {
      isWanted = false;
      await new Promise(next => setTimeout(next, Math.min(took, 300)));
      await translate();
    }
  } catch (error) {
    fail(error.message);
  } finally {
    isRunning = false;
    result.ariaBusy = "false";
  }
}

element("again").hidden = Object.keys(config.inputs).length < 2;
element("again").addEventListener("click", () => {
  seed++;
  changed();
});
element("save").addEventListener("click", () => result.toBlob(blob => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = `${config.name}.png`;
  link.click();
}));

// ------------------------------------------------------------------ the beginning

function say(state, message) {
  document.body.dataset.state = state;
  element("status").textContent = message;
}
const fail = message => say("failed", message);

/** The bytes of a script element of this page: gzip in base 64. */
async function unpack(id) {
  const response = await fetch(`data:application/gzip;base64,${element(id).textContent}`);
  element(id).remove();
  return new Response(response.body.pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
}

try {
  redraw();
  if (config.examples.length) addExample();
  const code = new Blob([await unpack("runtime")], { type: "text/javascript" });
  ort = await import(URL.createObjectURL(code));
  ort.env.wasm.numThreads = 1;  // more need a server that sends the right headers
  ort.env.wasm.wasmBinary = await unpack("wasm");
  session = await ort.InferenceSession.create(await unpack("model"), { executionProviders: ["wasm"] });
  changed();
} catch (error) {
  fail(`This browser cannot run the student: ${error.message}`);
}
