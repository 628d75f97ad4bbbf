// Talks to the service. A token is kept in this module alone, and never in storage.

let token = "";

export function useToken(value) {
  token = value.trim();
}

export function hasToken() {
  return token !== "";
}

// An answer that is an error, in words for people.
export class Problem extends Error {
  constructor(status, detail, retryAfter = 0) {
    super(detail);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

function headers() {
  return token ? { Authorization: `Bearer ${token}` } : {};
}

async function problemOf(answer) {
  let detail = `${answer.status} ${answer.statusText}`;
  try {
    detail = (await answer.json()).detail ?? detail;
  } catch {
    // not a problem document: its status has to do
  }
  return new Problem(answer.status, detail, Number(answer.headers.get("Retry-After") ?? 0));
}

async function answerOf(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, { ...options, headers: headers() });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(0, "the service does not answer; is it still running?");
  }
  if (!answer.ok) throw await problemOf(answer);
  return answer;
}

export async function getJson(path) {
  return (await answerOf(path)).json();
}

// Returns the bytes of a file and the name that the service gives it.
export async function getFile(path) {
  const answer = await answerOf(path);
  const named = /filename="([^"]+)"/.exec(answer.headers.get("Content-Disposition") ?? "");
  return { name: named ? named[1] : "file", bytes: await answer.arrayBuffer() };
}

export async function remove(path) {
  await answerOf(path, { method: "DELETE" });
}

// Sends a form; onSent(share) says how much of it has left. XMLHttpRequest, since fetch does not tell.
export function send(path, form, onSent, signal) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", path);
    for (const [name, value] of Object.entries(headers())) request.setRequestHeader(name, value);
    request.upload.onprogress = (event) => event.lengthComputable && onSent(event.loaded / event.total);
    request.onload = () => {
      let body = {};
      try {
        body = JSON.parse(request.responseText);
      } catch {
        // its status has to do
      }
      if (request.status < 300) return resolve(body);
      const after = Number(request.getResponseHeader("Retry-After") ?? 0);
      reject(new Problem(request.status, body.detail ?? `${request.status} ${request.statusText}`, after));
    };
    request.onerror = () => reject(new Problem(0, "the service hung up, or does not answer"));
    request.onabort = () => reject(new DOMException("cancelled", "AbortError"));
    signal.addEventListener("abort", () => request.abort());
    request.send(form);
  });
}

const FINISHED = ["done", "failed", "cancelled"];
const PAUSE_MS = 1000;
const PATIENCE_MS = 120000;

// Calls onChange with every change of a job and returns it once it is finished. A stream that breaks (a part of the
// service was restarted) is taken up again.
export async function follow(job, onChange, signal) {
  let lost = 0;
  while (!FINISHED.includes(job.state)) {
    try {
      for await (const view of events(job.links.events, signal)) {
        job = view;
        lost = 0;
        onChange(job);
      }
      if (!FINISHED.includes(job.state)) job = await getJson(job.links.self);
    } catch (error) {
      if (error.name === "AbortError" || (error.status >= 400 && error.status < 500)) throw error;
      lost ||= Date.now();
      if (Date.now() - lost > PATIENCE_MS) throw error;
      await new Promise((resolve) => setTimeout(resolve, PAUSE_MS));
    }
  }
  return job;
}

async function* events(path, signal) {
  const answer = await answerOf(path, { signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const name = /^event: (.*)$/m.exec(block)?.[1];
      const data = /^data: (.*)$/m.exec(block)?.[1];
      if (name === "job") yield JSON.parse(data);
      if (name === "problem") {
        const { status, detail } = JSON.parse(data);
        throw new Problem(status, detail);
      }
    }
  }
}
