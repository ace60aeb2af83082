// A picture with what was found drawn over it: the two change together, so that no box is ever shown on another frame.

const COLOURS = ["#ff7a3d", "#3fb6ff", "#ffd23f", "#5fd38d", "#e07bff", "#ff6f91", "#9ad0c2"];

export function colour(category) {
  return COLOURS[(category - 1 + COLOURS.length) % COLOURS.length];
}

export function pictureUrl(event, side) {
  return `/pictures/${encodeURIComponent(event.camera)}/${event.epoch}/${event.frame}?side=${side}`;
}

/** Runs of COCO's compressed run-length code: column by column, 0 and 1 in turn, beginning with 0. */
export function runs(counts) {
  const out = [];
  for (let at = 0; at < counts.length; ) {
    let value = 0, shift = 0, group;
    do {
      group = counts.charCodeAt(at++) - 48;
      value |= (group & 0x1f) << shift;
      shift += 5;
    } while (group & 0x20);
    if (group & 0x10) value |= -1 << shift;
    if (out.length > 2) value += out[out.length - 2];
    out.push(value);
  }
  return out;
}

export class Overlay {
  /** `view`: the positioned element. `side`: how large a picture is asked for, pixels. */
  constructor(view, side) {
    this.view = view;
    this.side = side;
    this.options = { score: 0.5, boxes: true, masks: true, task: 0 };
    this.event = null; // what is shown
    this.image = document.createElement("img");
    this.image.alt = "";
    this.image.decoding = "async";
    this.canvas = document.createElement("canvas");
    this.canvas.setAttribute("aria-hidden", "true");
    this.note = document.createElement("p");
    this.note.className = "note";
    view.append(this.image, this.canvas, this.note);
    this.loading = false;
    this.next = null;
    new ResizeObserver(() => this.draw()).observe(view);
  }

  /** Shows an event; while one picture is on its way only the newest that waits is kept. Resolves when it stands. */
  async show(event) {
    if (this.loading) {
      this.next = event;
      return;
    }
    this.loading = true;
    // Said only where it takes long enough to be noticed, and nothing stands there yet.
    const slow = this.event ? null : setTimeout(() => (this.note.textContent = "Decoding"), 700);
    try {
      let wanted = event;
      while (wanted) {
        this.next = null;
        await this.#load(wanted);
        wanted = this.next;
      }
    } finally {
      clearTimeout(slow);
      this.loading = false;
    }
  }

  async #load(event) {
    if (this.event && this.event.sequence === event.sequence) return;
    let image = null;
    if (event.outcome === "detections") {
      image = new Image();
      image.src = pictureUrl(event, this.side);
      try {
        await image.decode();
      } catch {
        image = null;
      }
    }
    this.event = event;
    this.view.style.aspectRatio = event.width ? `${event.width} / ${event.height}` : "";
    this.view.classList.toggle("gone", !image);
    if (image) {
      image.alt = this.image.alt;
      image.className = this.image.className;
      this.image.replaceWith(image);
      this.image = image;
    } else {
      this.image.removeAttribute("src");
    }
    this.note.textContent = image ? "" : event.outcome === "detections" ? "Picture not kept" : event.reason || "No picture";
    this.draw();
  }

  /** Another picture of the frame that is shown, such as one that its edge coded again. */
  async replace(blob) {
    const image = new Image();
    image.src = URL.createObjectURL(blob);
    try {
      await image.decode();
      this.image.replaceWith(image);
      this.image = image;
    } finally {
      URL.revokeObjectURL(image.src);
    }
  }

  /** The objects that are drawn. */
  shown() {
    if (!this.event) return [];
    const { score, task } = this.options;
    const results = task === "all" ? this.event.results : this.event.results.slice(task, task + 1);
    return results.flatMap((result) => result.objects).filter((object) => object.score >= score);
  }

  draw() {
    const event = this.event;
    const width = this.view.clientWidth, height = this.view.clientHeight;
    if (!event || !width || !height) return;
    const dense = Math.min(window.devicePixelRatio || 1, 2);
    if (this.canvas.width !== Math.round(width * dense)) this.canvas.width = Math.round(width * dense);
    if (this.canvas.height !== Math.round(height * dense)) this.canvas.height = Math.round(height * dense);
    const context = this.canvas.getContext("2d");
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    const objects = this.shown();
    if (!event.width || !objects.length) return;
    // The picture is fitted into the view; so is what is drawn over it.
    const scale = Math.min(width / event.width, height / event.height);
    context.setTransform(dense, 0, 0, dense, dense * (width - event.width * scale) / 2, dense * (height - event.height * scale) / 2);
    if (this.options.masks) this.#masks(context, objects, event, scale);
    if (this.options.boxes) this.#boxes(context, objects, event, scale);
  }

  #masks(context, objects, event, scale) {
    const masked = objects.filter((object) => object.mask);
    if (!masked.length) return;
    const step = Math.max(1, Math.floor(1 / scale / 1.5));
    const columns = Math.ceil(event.width / step), rows = Math.ceil(event.height / step);
    const pixels = new ImageData(columns, rows);
    const words = new Uint32Array(pixels.data.buffer);
    for (const object of masked) {
      const hex = colour(object.category);
      const word = (0x6e << 24) | (parseInt(hex.slice(5, 7), 16) << 16) | (parseInt(hex.slice(3, 5), 16) << 8) | parseInt(hex.slice(1, 3), 16);
      let at = 0, inside = false;
      for (const run of runs(object.mask)) {
        if (inside) {
          for (let start = at; start < at + run; ) {
            const x = Math.floor(start / event.height), y = start - x * event.height;
            const length = Math.min(event.height - y, at + run - start);
            if (x % step === 0) {
              const end = Math.floor((y + length - 1) / step);
              for (let row = Math.ceil(y / step); row <= end; row++) words[row * columns + x / step] = word;
            }
            start += length;
          }
        }
        at += run;
        inside = !inside;
      }
    }
    const drawn = document.createElement("canvas");
    drawn.width = columns;
    drawn.height = rows;
    drawn.getContext("2d").putImageData(pixels, 0, 0);
    context.drawImage(drawn, 0, 0, columns * step * scale, rows * step * scale);
  }

  #boxes(context, objects, event, scale) {
    const small = this.view.clientWidth < 420;
    context.font = `550 ${small ? 11 : 13}px ui-sans-serif, system-ui, "Liberation Sans", Arial, sans-serif`;
    context.textBaseline = "middle";
    const taken = [];
    const tall = small ? 16 : 20;
    const large = [...objects].sort((a, b) => area(b.box) - area(a.box));
    for (const object of large) {
      const [left, top, right, bottom] = object.box.map((side) => side * scale);
      const ink = colour(object.category);
      context.lineWidth = small ? 3 : 4;
      context.strokeStyle = "rgb(0 0 0 / .35)";
      context.strokeRect(left, top, right - left, bottom - top);
      context.lineWidth = small ? 1.5 : 2;
      context.strokeStyle = ink;
      context.strokeRect(left, top, right - left, bottom - top);
      const text = small ? object.label : `${object.label} ${Math.round(100 * object.score)}`;
      const wide = context.measureText(text).width + (small ? 8 : 12);
      const corner = [[left, top], [left, bottom - tall], [right - wide, top], [right - wide, bottom - tall]].find(
        ([x, y]) => x >= -1 && x + wide <= event.width * scale + 1 && !taken.some((other) => overlaps(x, y, wide, tall, other)),
      );
      if (!corner) continue; // the list beside the picture names it
      taken.push([...corner, wide, tall]);
      context.fillStyle = ink;
      context.fillRect(...corner, wide, tall);
      context.fillStyle = "#15110d";
      context.fillText(text, corner[0] + (small ? 4 : 6), corner[1] + tall / 2 + 0.5);
    }
  }
}

function area([left, top, right, bottom]) {
  return (right - left) * (bottom - top);
}

function overlaps(x, y, wide, tall, [left, top, width, height]) {
  return x < left + width && left < x + wide && y < top + height && top < y + tall;
}
