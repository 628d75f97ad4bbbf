// The page: a form that makes jobs of the service, and the viewer of what came out.

import { Problem, follow, getFile, getJson, hasToken, remove, send, useToken } from "/web/service.js";
import { Viewer } from "/web/viewer.js";
import { Volumes } from "/web/volumes.js";

const $ = (id) => document.getElementById(id);
const modes = [...document.querySelectorAll("[data-mode]")].filter((one) => one.tagName === "BUTTON");
const canDraw = Viewer.isSupported();
const viewer = new Viewer($("source-view"), $("result-view"), showWindows, (text) => ($("position").textContent = text));

const volumes = new Volumes($("volumes"), showChosen);
let job = null;
let running = null; // AbortController of what goes on
let blinking = null;
let models = null;

// ------------------------------------------------------------------------------------------------------------- start

async function start() {
  tell("");
  try {
    models = await getJson("/v1/models");
  } catch (error) {
    if (error.status === 401) $("token-field").hidden = false;
    return complain(error);
  }
  $("token-field").hidden = !hasToken();
  complain(null);
  const model = models.models[0];
  $("model").textContent = `${model.name}: ${model.description}`;
  volumes.setModalities(model.modalities);
  $("file").multiple = model.takes_several;
  $("several").hidden = !model.takes_several;
  fill($("sampler"), model.samplers.map((one) => one.name));
  $("targets").replaceChildren(...model.modalities.map(checkbox));
  $("more").hidden = false;
  const hasChain = model.samplers.some((one) => one.name !== "one-step");
  $("sampler").disabled = model.samplers.length === 0;
  for (const id of ["steps", "samples"]) $(id).disabled = !hasChain; // one evaluation, one answer
  const { max_upload_bytes, keep_hours } = models.limits;
  $("limits").textContent =
    `Uploads of up to ${Math.round(max_upload_bytes / 1e6)} MB. Volume and results stay on this service and are ` +
    `deleted after ${keep_hours} h, or when you say so.`;
  $("samples").max = models.limits.max_samples;
  showCard(model.card);
  if (!canDraw) {
    $("empty").textContent = "This browser has no WebGL2: a picture of the result appears here instead of the viewer.";
  }
  showCurl();
}

function fill(select, names) {
  while (select.options.length > 1) select.remove(1);
  select.append(...names.map((name) => new Option(name, name)));
}

function checkbox(name, index, all) {
  const label = document.createElement("label");
  const input = document.createElement("input");
  Object.assign(input, { type: "checkbox", name: "target", value: name, checked: index === Math.min(1, all.length - 1) });
  label.append(input, ` ${name}`);
  return label;
}

function methodOf({ method, sampler, num_inference_steps: steps }) {
  return sampler ? `${method} (${sampler}, ${steps} ${steps === 1 ? "step" : "steps"})` : method;
}

function showCard(rows) {
  $("card-area").hidden = rows.length === 0;
  const columns = [
    ["method", methodOf],
    ["region", (row) => row.region],
    ["PSNR, dB", (row) => row.psnr_db.toFixed(2)],
    ["NMSE", (row) => row.nmse.toFixed(3)],
    ["SSIM", (row) => row.ssim.toFixed(3)],
    ["s per volume", (row) => (row.seconds === null ? "" : row.seconds.toFixed(2))],
  ];
  const line = (cells, tag) => {
    const tr = document.createElement("tr");
    tr.append(
      ...cells.map((text, index) => {
        const cell = document.createElement(tag);
        cell.textContent = text;
        if (index > 1) cell.className = "number";
        return cell;
      }),
    );
    return tr;
  };
  $("card").replaceChildren(
    line(columns.map(([name]) => name), "th"),
    ...rows.map((row) => line(columns.map(([, text]) => text(row)), "td")),
  );
}

// -------------------------------------------------------------------------------------------------------------- form

// A model that takes several volumes keeps those that are chosen already.
function choose(files) {
  if (models?.models[0].takes_several) volumes.add(files);
  else volumes.replace(files);
}

function showChosen() {
  const { files } = volumes;
  const megabytes = (files.reduce((sum, file) => sum + file.size, 0) / 1e6).toFixed(1);
  const words = { 0: "Drop a volume here, or choose a file", 1: `${files[0]?.name} (${megabytes} MB)` };
  $("file-name").textContent = words[files.length] ?? `${files.length} volumes (${megabytes} MB)`;
  $("file").value = ""; // so that the same file can be chosen again after it was removed
  tell(files.length ? `Chosen: ${files.map((file) => file.name).join(", ")}.` : "No volume is chosen.");
  complain(tooMany());
  showCurl();
}

function tooMany() {
  const { takes_several: takesSeveral } = models?.models[0] ?? {};
  if (volumes.files.length < 2 || takesSeveral) return null;
  return new Problem(0, `this model takes one volume, and ${volumes.files.length} are chosen: remove the others`);
}

async function takeExample() {
  tell("Fetching the example …");
  try {
    const { name, bytes } = await getFile("/v1/example");
    volumes.replace([new File([bytes], name)]);
    tell("The example is chosen.");
  } catch (error) {
    complain(error);
  }
}

function targets() {
  return [...document.querySelectorAll('input[name="target"]:checked')].map((one) => one.value);
}

// The fields that are sent, without what is left to the service.
function fields() {
  const chosen = [...targets().map((name) => ["target", name])];
  const optional = { sampler: "sampler", num_inference_steps: "steps", num_samples: "samples", seed: "seed", series: "series" };
  for (const [name, id] of Object.entries(optional)) {
    if ($(id).value !== "" && !(id === "seed" && $(id).value === "0")) chosen.push([name, $(id).value]);
  }
  if ($("format").value !== "nii.gz") chosen.push(["format", $("format").value]);
  if ($("accept-unlike").checked) chosen.push(["accept_unlike", "true"]);
  return chosen;
}

function showCurl() {
  const words = ["curl"];
  if (hasToken()) words.push('-H "Authorization: Bearer $ALDM_TOKEN"');
  const chosen = volumes.files.length ? volumes.fields : [["volume", { name: "scan.nii.gz" }], ["source", "auto"]];
  words.push(...[...chosen, ...fields()].map(([name, value]) => `-F ${name}=${value.name ? `@${quoted(value.name)}` : quoted(value)}`));
  const wanted = targets();
  if (wanted.length === 1 && $("format").value === "nii.gz") {
    words.push(`-o ${quoted(`synthetic-${wanted[0]}.nii.gz`)}`, `${location.origin}/v1/translate`);
  } else {
    words.push(`${location.origin}/v1/translations`);
  }
  $("curl").textContent = words.join(" \\\n  ");
}

function quoted(text) {
  return /^[\w.@%+=:,/-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
}

// --------------------------------------------------------------------------------------------------------- translate

async function translate() {
  if (running) return;
  complain(null);
  if (tooMany()) return complain(tooMany());
  if (!volumes.files.length) return complain(new Problem(0, "choose a volume first, or take the example"));
  if (targets().length === 0) return complain(new Problem(0, "choose at least one wanted modality"));
  running = new AbortController();
  busy(true);
  try {
    await forget();
    job = await submitted(running.signal);
    const from = { request: "as you said", "file name": "by its name", header: "by its header" };
    const said = Object.entries(job.sources).map(([name, by]) => `a ${name}, ${from[by]}`);
    tell(said.length === 1 ? `The volume is ${said[0]}.` : `The volumes are ${said.join("; ")}.`);
    job = await follow(job, showProgress, running.signal);
    if (job.state === "failed") throw new Problem(job.error.status, job.error.detail);
    if (job.state === "cancelled") return tell("Cancelled.");
    await showJob();
    tell(`Done in ${job.seconds_running.toFixed(1)} s: ${job.targets.join(", ")} from ${Object.keys(job.sources).join(" + ")}${covered(job)}. ${likeness(job)}${uncertain(job)}`);
  } catch (error) {
    if (error.name === "AbortError") tell("Cancelled.");
    else complain(error);
  } finally {
    running = null;
    busy(false);
  }
}

// How far the volume is from what the model was trained on.
function likeness({ likeness: found, sources }) {
  if (!found) return "Its likeness to the training data was not measured.";
  const { distance, source, differs_in, looks_like } = found;
  const it = Object.keys(sources).length === 1 ? "It" : `Its ${source}, the least alike,`;
  const near = looks_like === source ? "" : `, nearer to ${looks_like}`;
  if (distance <= 1) return `${it} is like the training data: ${distance.toFixed(2)} of 1 allowed${near}.`;
  return `${it} is unlike the training data (${distance.toFixed(2)}, 1 allowed, most of all in ${differs_in}${near}): trust it less.`;
}

// What of the volume was translated.
function uncertain({ uncertainty_level: level }) {
  if (!level) return " How far off it may be is not known.";
  return ` ${Math.round(100 * level)} % of the voxels should lie within its uncertainty.`;
}

function covered({ num_boxes, share_outside }) {
  const boxes = `, in ${num_boxes} ${num_boxes === 1 ? "box" : "boxes"} of the model's size`;
  if (share_outside === 0) return `${boxes}; nothing of the foreground lies outside`;
  return `${boxes}; ${(100 * share_outside).toFixed(2)} % of the foreground lies outside and is background in the result`;
}

// Sends the volumes, again and again while the service is busy.
async function submitted(signal) {
  const form = new FormData();
  for (const [name, value] of [...volumes.fields, ...fields()]) form.append(name, value);
  const onSent = (share) => progress(null, share < 1 ? `Sending: ${Math.round(100 * share)} %` : "Checking the volume …");
  for (;;) {
    try {
      return await send("/v1/translations", form, onSent, signal);
    } catch (error) {
      if (error.status !== 503) throw error;
      $("stop-waiting").hidden = false;
      for (let left = Math.max(1, error.retryAfter); left > 0; left--) {
        progress(null, `${error.message.split(";")[0]}; trying again in ${left} s`);
        await new Promise((resolve) => setTimeout(resolve, 1000));
        if (signal.aborted) throw new DOMException("cancelled", "AbortError");
      }
      $("stop-waiting").hidden = true;
    }
  }
}

function showProgress(view) {
  if (view.state === "queued") return progress(null, `Place ${view.queue_position + 1} in the queue`);
  const seconds = view.seconds_running ?? 0;
  const left = view.progress > 0.02 ? `, about ${Math.ceil((seconds * (1 - view.progress)) / view.progress)} s to go` : "";
  const again = view.attempt > 1 ? ` (attempt ${view.attempt})` : "";
  progress(view.progress, `Translating${again}: ${Math.round(100 * view.progress)} %, ${seconds.toFixed(0)} s${left}`);
}

function progress(share, text) {
  if (share === null) $("progress").removeAttribute("value");
  else $("progress").value = share;
  $("progress-text").textContent = text;
}

async function cancel() {
  if (!running) return;
  const made = job;
  running.abort();
  if (made && !["done", "failed"].includes(made.state)) await remove(made.links.self).catch(() => {});
}

// Removes the last job from the service: its pictures are about to be replaced.
async function forget() {
  const old = job;
  job = null;
  $("downloads").hidden = true;
  for (const id of ["shown", "shown-source"]) $(id).disabled = true; // there is nothing to fetch any more
  if (old) await remove(old.links.self).catch(() => {});
}

function busy(is) {
  $("translate").disabled = is;
  $("cancel").hidden = !is;
  $("progress-area").hidden = !is;
  $("stop-waiting").hidden = true;
  if (is) progress(null, "Sending …");
}

// ------------------------------------------------------------------------------------------------------------ viewing

async function showJob() {
  const shown = $("shown");
  shown.replaceChildren(...job.targets.map((name) => new Option(name, name)));
  $("shown-area").hidden = job.targets.length < 2;
  $("downloads").hidden = false;
  for (const id of ["shown", "shown-source"]) $(id).disabled = false;
  const links = Object.values(job.links.results)[0];
  for (const kind of ["uncertainty", "spread"]) document.querySelector(`[data-file="${kind}"]`).hidden = !links[kind];
  if (!canDraw) return showPreview();
  const names = Object.keys(job.sources);
  $("shown-source").replaceChildren(...names.map((name) => new Option(name, name)));
  $("shown-source-area").hidden = names.length < 2;
  await showSource();
  for (const id of ["toolbar", "windows"]) $(id).hidden = false;
  $("empty").hidden = true;
}

async function showSource() {
  const name = $("shown-source").value;
  const { bytes } = await getFile(job.links.sources[name]);
  await viewer.showSource(bytes, "source.nii.gz");
  $("source-caption").textContent = `${name}: the volume as it came`;
  $("source-caption").hidden = false;
  await showTarget();
}

async function showTarget() {
  const target = $("shown").value;
  if (!canDraw) return showPreview();
  const links = job.links.results[target];
  const kind = ["uncertainty", "spread"].find((one) => links[one]);
  const map = kind ? (await getFile(links[kind])).bytes : null;
  const bytes = job.format === "nii.gz" ? (await getFile(links.result)).bytes : null;
  $("map-area").hidden = !map || !bytes;
  if (bytes) {
    const share = Math.round(100 * (job.uncertainty_level ?? 0));
    const isCalibrated = kind === "uncertainty";
    $("map-name").textContent = isCalibrated ? `Uncertainty (${share} % are within ±)` : "Sample spread (not calibrated)";
    const words = (value) => (isCalibrated ? ` ± ${value} (${share} %)` : `, sample spread ${value}`);
    await viewer.showResult(bytes, "result.nii.gz", map, words);
    showMap();
  } else {
    await showPreview(); // a zip of DICOM files
  }
  $("result-caption").textContent = `${target}: synthetic, research use only`;
  $("result-caption").hidden = false;
}

async function showPreview() {
  const { bytes } = await getFile(job.links.results[$("shown").value].preview);
  URL.revokeObjectURL($("preview").src);
  $("preview").src = URL.createObjectURL(new Blob([bytes], { type: "image/png" }));
  $("preview").alt = "Source and translation in three planes; the translation is synthetic, for research use only";
  $("preview").hidden = false;
  $("empty").hidden = true;
}

function showWindows() {
  for (const which of ["source", "result"]) {
    const range = viewer.window(which);
    if (!range) continue;
    $(`${which}-low`).value = Number(range[0].toPrecision(4));
    $(`${which}-high`).value = Number(range[1].toPrecision(4));
  }
}

function showMap() {
  viewer.setMap($("map").checked ? Number($("map-opacity").value) : 0);
  const range = viewer.mapRange();
  $("map-scale").hidden = !$("map").checked || !range;
  if (!range) return;
  $("map-low").textContent = `≤ ${Number(range[0].toPrecision(2))}`; // not 1.2e+2
  $("map-high").textContent = `≥ ${Number(range[1].toPrecision(2))}`;
}

function setMode(mode) {
  const views = $("views");
  views.dataset.mode = mode;
  for (const button of modes) button.setAttribute("aria-pressed", String(button.dataset.mode === mode));
  $("divider").hidden = mode !== "slider";
  $("rate-area").hidden = mode !== "blink";
  clearInterval(blinking);
  views.dataset.shown = "result";
  if (mode === "blink") {
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    const seconds = Math.max(0.3, Number($("rate").value) || 1);
    const swap = () => (views.dataset.shown = views.dataset.shown === "source" ? "result" : "source");
    if (still) swap(); // each press of the button shows the other one
    else blinking = setInterval(swap, 1000 * seconds);
  }
}

async function download(kind) {
  const target = $("shown").value;
  const links = job.links.results[target];
  try {
    if (kind === "provenance") {
      const made = await getJson(`${job.links.self}/provenance?target=${target}`);
      save(`synthetic-${target}.json`, new Blob([JSON.stringify(made, null, 2)], { type: "application/json" }));
    } else {
      const { name, bytes } = await getFile(links[kind]);
      save(kind === "preview" ? `synthetic-${target}.png` : name, new Blob([bytes]));
    }
  } catch (error) {
    complain(error);
  }
}

function save(name, blob) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// ----------------------------------------------------------------------------------------------------------- messages

function tell(text) {
  $("status").textContent = text;
}

function complain(error) {
  if (error && !(error instanceof Problem)) console.error(error);
  $("problem").textContent = error ? sentence(error.message) : "";
  if (error) tell("");
  if (error?.status === 401) $("token-field").hidden = false;
}

function sentence(text) {
  return text.charAt(0).toUpperCase() + text.slice(1) + (text.endsWith(".") ? "" : ".");
}

// ------------------------------------------------------------------------------------------------------------- events

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  translate();
});
$("form").addEventListener("input", showCurl);
$("file").addEventListener("change", () => $("file").files.length && choose([...$("file").files]));
for (const name of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", name === "dragenter" || name === "dragover");
    if (name === "drop" && event.dataTransfer.files.length) choose([...event.dataTransfer.files]);
  });
}
$("example").addEventListener("click", takeExample);
$("use-token").addEventListener("click", () => {
  useToken($("token").value);
  start();
});
$("cancel").addEventListener("click", cancel);
$("stop-waiting").addEventListener("click", cancel);
$("copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText($("curl").textContent);
    tell("Copied.");
  } catch {
    getSelection().selectAllChildren($("curl"));
    tell("Selected: copy it with your keyboard.");
  }
});
$("delete").addEventListener("click", async () => {
  await forget();
  tell("Volume and results are deleted from the service; the pictures stay until the page is closed.");
});
$("shown-source").addEventListener("change", () => showSource().catch(complain));
$("shown").addEventListener("change", () => showTarget().catch(complain));
$("planes").addEventListener("change", () => viewer.setPlanes(Number($("planes").value)));
$("map").addEventListener("change", showMap);
$("map-opacity").addEventListener("input", showMap);
$("rate").addEventListener("change", () => setMode("blink"));
$("divider").addEventListener("input", () => $("views").style.setProperty("--divider", `${$("divider").value}%`));
for (const button of modes) button.addEventListener("click", () => setMode(button.dataset.mode));
for (const button of document.querySelectorAll("[data-file]")) {
  button.addEventListener("click", () => download(button.dataset.file));
}
for (const which of ["source", "result"]) {
  const change = () => viewer.setWindow(which, Number($(`${which}-low`).value), Number($(`${which}-high`).value));
  $(`${which}-low`).addEventListener("change", change);
  $(`${which}-high`).addEventListener("change", change);
  $(`${which}-reset`).addEventListener("click", () => viewer.resetWindow(which));
}

const MOVES = {
  ArrowLeft: [-1, 0, 0],
  ArrowRight: [1, 0, 0],
  ArrowUp: [0, 1, 0],
  ArrowDown: [0, -1, 0],
  PageUp: [0, 0, 1],
  PageDown: [0, 0, -1],
};
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") return cancel();
  const typing = event.target.closest("input:not([type=range], [type=checkbox]), select");
  if (typing || event.ctrlKey || event.altKey || event.metaKey || $("toolbar").hidden) return;
  const mode = { 1: "side", 2: "blink", 3: "slider" }[event.key];
  if (mode) setMode(mode);
  else if (event.key === "u" && !$("map-area").hidden) {
    $("map").checked = !$("map").checked;
    showMap();
  } else if (event.key === "r") {
    for (const which of ["source", "result"]) viewer.resetWindow(which);
  } else if (MOVES[event.key] && !event.target.closest("input, pre")) {
    event.preventDefault();
    viewer.move(...MOVES[event.key]);
  }
});

start();
