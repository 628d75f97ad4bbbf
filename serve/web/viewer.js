// Two linked views of NiiVue: the source, and its translation with a map over it: its uncertainty, or the spread of samples.
/* global niivue */

const OPTIONS = {
  backColor: [0, 0, 0, 1],
  crosshairColor: [0.95, 0.75, 0.2, 0.9],
  crosshairWidth: 0.6,
  dragAndDropEnabled: false,
  isRadiologicalConvention: true,
  multiplanarShowRender: 0,
  isColorbar: false,
  loadingText: "",
  logLevel: "error",
};
const TRANSLUCENT_BELOW_MIN = 2; // NiiVue's COLORMAP_TYPE: small values let the picture through
const LINKS = { "2d": true, "3d": true, crosshair: true, zoomPan: true };

export class Viewer {
  // onWindow() is called when a window changes by the mouse, onPosition(text) when the cross-hair moves.
  constructor(sourceCanvas, resultCanvas, onWindow, onPosition) {
    this.canvases = [sourceCanvas, resultCanvas];
    this.onWindow = onWindow;
    this.onPosition = onPosition;
    this.ready = null;
  }

  static isSupported() {
    return Boolean(document.createElement("canvas").getContext("webgl2"));
  }

  async open() {
    this.ready ??= this.#attach();
    return this.ready;
  }

  async #attach() {
    this.source = new niivue.Niivue(OPTIONS);
    this.result = new niivue.Niivue(OPTIONS);
    const views = [this.source, this.result];
    for (const [index, view] of views.entries()) {
      await view.attachToCanvas(this.canvases[index]);
      view.broadcastTo([views[1 - index]], LINKS);
      view.onIntensityChange = () => this.onWindow();
      view.onLocationChange = () => this.onPosition(this.position());
      view.setSliceType(view.sliceTypeMultiplanar);
    }
  }

  async showSource(bytes, name) {
    await this.open();
    await this.#load(this.source, bytes, name, "gray");
    this.#clear(this.result);
    this.sourceWindow = windowOf(this.source);
    this.onWindow();
  }

  // map: the bytes of what is laid over the result, or null; words(value) says its value at the cross-hair.
  async showResult(bytes, name, map, words) {
    this.#clear(this.result);
    await this.#load(this.result, bytes, name, "gray");
    this.resultWindow = windowOf(this.result);
    this.words = words;
    if (map) {
      await this.result.loadFromArrayBuffer(map, "map.nii.gz");
      const volume = this.result.volumes[1];
      volume.colormap = "inferno";
      volume.colormapType = TRANSLUCENT_BELOW_MIN;
      volume.cal_max = volume.robust_max || volume.global_max;
      volume.cal_min = volume.cal_max / 3;
      this.setMap(0);
    }
    this.result.scene.crosshairPos = [...this.source.scene.crosshairPos];
    this.result.drawScene();
    this.onWindow();
    this.onPosition(this.position());
  }

  async #load(view, bytes, name, colormap) {
    this.#clear(view);
    await view.loadFromArrayBuffer(bytes, name);
    view.setColormap(view.volumes[0].id, colormap);
  }

  #clear(view) {
    while (view.volumes.length) view.removeVolumeByIndex(view.volumes.length - 1);
    view.drawScene();
  }

  hasResult() {
    return Boolean(this.result?.volumes.length);
  }

  setMap(opacity) {
    if ((this.result?.volumes.length ?? 0) > 1) this.result.setOpacity(1, opacity);
  }

  // Returns [low, high], the values that the colours of the map run between; null without one.
  mapRange() {
    const map = this.result?.volumes[1];
    return map ? [map.cal_min, map.cal_max] : null;
  }

  setPlanes(kind) {
    for (const view of [this.source, this.result]) view.setSliceType(kind);
  }

  // Returns [low, high] of "source" or "result"; null where there is none.
  window(which) {
    return this[which]?.volumes.length ? windowOf(this[which]) : null;
  }

  setWindow(which, low, high) {
    const view = this[which];
    if (!view?.volumes.length || !(low < high)) return;
    view.volumes[0].cal_min = low;
    view.volumes[0].cal_max = high;
    view.updateGLVolume();
  }

  resetWindow(which) {
    const initial = this[`${which}Window`];
    if (initial) this.setWindow(which, ...initial);
    this.onWindow();
  }

  move(x, y, z) {
    if (!this.source?.volumes.length) return;
    this.source.moveCrosshairInVox(x, y, z);
    if (this.hasResult()) {
      this.result.scene.crosshairPos = [...this.source.scene.crosshairPos];
      this.result.drawScene();
    }
    this.onPosition(this.position());
  }

  position() {
    if (!this.source?.volumes.length) return "";
    const at = this.source.scene.crosshairPos;
    const mm = [...this.source.frac2mm(at)].slice(0, 3).map((value) => value.toFixed(0));
    const values = [this.source, this.result]
      .filter((view) => view.volumes.length)
      .map((view) => {
        const volume = view.volumes[0];
        return Number(volume.getValue(...view.frac2vox(at))).toPrecision(4);
      });
    let words = values.length > 1 ? `source ${values[0]}, result ${values[1]}` : `source ${values[0]}`;
    const map = this.result?.volumes[1];
    if (map) words += this.words(Number(Number(map.getValue(...this.result.frac2vox(at))).toPrecision(3)));
    return `x ${mm[0]}, y ${mm[1]}, z ${mm[2]} mm: ${words}`;
  }
}

function windowOf(view) {
  return [view.volumes[0].cal_min, view.volumes[0].cal_max];
}
