// The chosen files, and what each is: a list with a select and a button for every one.

export class Volumes {
  #list;
  #rows = []; // { file, select, item }
  #modalities = [];
  #onChange;

  // onChange() is called when a file comes or goes.
  constructor(list, onChange) {
    this.#list = list;
    this.#onChange = onChange;
  }

  setModalities(names) {
    this.#modalities = names;
    for (const { select } of this.#rows) fill(select, names);
  }

  get files() {
    return this.#rows.map(({ file }) => file);
  }

  // The form's fields, [name, value] each, the first file first: what is to be guessed goes as `volume`.
  get fields() {
    if (this.#rows.length === 1) return [["volume", this.#rows[0].file], ["source", this.#rows[0].select.value]];
    return this.#rows.map(({ file, select }) => [select.value === "auto" ? "volume" : `volume_${select.value}`, file]);
  }

  replace(files) {
    this.#rows = [];
    this.#list.replaceChildren();
    this.add(files);
  }

  // A file that is there already is not taken a second time.
  add(files) {
    for (const file of files) {
      if (!this.files.some((one) => isSame(one, file))) this.#append(file);
    }
    this.#onChange();
  }

  #append(file) {
    const item = document.createElement("li");
    const label = document.createElement("label");
    const select = document.createElement("select");
    const button = document.createElement("button");
    fill(select, this.#modalities);
    label.append(`${file.name} is a `, select);
    Object.assign(button, { type: "button", textContent: "Remove" });
    button.setAttribute("aria-label", `Remove ${file.name}`);
    const row = { file, select, item };
    button.addEventListener("click", () => {
      this.#rows = this.#rows.filter((one) => one !== row);
      item.remove();
      this.#onChange();
      (this.#list.querySelector("button") ?? this.#list.previousElementSibling).focus(); // this one is gone
    });
    item.append(label, button);
    this.#list.append(item);
    this.#rows.push(row);
  }
}

function isSame(one, other) {
  return one.name === other.name && one.size === other.size && one.lastModified === other.lastModified;
}

function fill(select, names) {
  const options = [new Option("guess it", "auto"), ...names.map((name) => new Option(name, name))];
  const chosen = select.value;
  select.replaceChildren(...options);
  if (names.includes(chosen)) select.value = chosen;
}
