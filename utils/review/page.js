// The review page. `element` is the page's root and `server` has the calls of ReviewPage; both come from gr.HTML.
const find = (selector) => element.querySelector(selector);
const make = (tag, className, text) => {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text; // class names are data, never markup
  return made;
};
const MARKS = { accept: "✓", reject: "✗" };
const DIGITS = "1234567890";

let overview = null; // of ReviewPage.overview
let current = null; // the page that is shown
let selected = 0; // place on it
let saving = Promise.resolve(); // changes are saved in the order in which they were made
let blind = null;
const said = new Map(); // number -> verdict that was given since the page was loaded
const ahead = new Map(); // "label:page" -> promise of a page that may come next

function fail(error) {
  find(".error").textContent = `Not saved or not loaded: ${error?.message || error}. Check the terminal, then reload.`;
  find(".error").hidden = false;
}

function show(view) {
  for (const name of ["grid", "blind", "summary"]) find(`.${name}-view`).hidden = name !== view;
}

function drawProgress(progress) {
  const button = find(`.class[data-label="${progress.label}"]`);
  button.querySelector(".count").textContent = `${progress.num_reviewed} / ${progress.num_images}`;
  const rejected = progress.num_reviewed - progress.num_accepted;
  button.querySelector(".accepted").style.width = `${(100 * progress.num_accepted) / progress.num_images}%`;
  button.querySelector(".rejected").style.width = `${(100 * rejected) / progress.num_images}%`;
  overview.classes.find((known) => known.label === progress.label).num_reviewed = progress.num_reviewed;
}

function drawClasses() {
  for (const progress of overview.classes) {
    const button = make("button", "class");
    button.dataset.label = progress.label;
    const bar = make("div", "bar");
    bar.append(make("div", "accepted"), make("div", "rejected"));
    button.append(make("span", "name", progress.name), make("span", "count"), bar);
    button.onclick = () => { button.blur(); openClass(progress.label); };
    find(".classes").append(button);
    drawProgress(progress);
  }
}

function verdictOf(image) {
  return said.has(image.number) ? said.get(image.number) : image.verdict;
}

function drawVerdict(place) {
  const tile = find(".grid").children[place], verdict = verdictOf(current.images[place]);
  tile.classList.toggle("accept", verdict === "accept");
  tile.classList.toggle("reject", verdict === "reject");
  tile.querySelector(".mark").textContent = MARKS[verdict] || "";
}

function select(place) {
  const tiles = find(".grid").children;
  if (!tiles.length) return;
  tiles[selected]?.classList.remove("selected");
  selected = Math.max(0, Math.min(place, tiles.length - 1));
  tiles[selected].classList.add("selected");
  tiles[selected].scrollIntoView({ block: "nearest" });
}

function drawPage(page, place = 0) {
  const isNewClass = current?.label !== page.label;
  current = page;
  const known = overview.classes.find((one) => one.label === page.label);
  find(".grid-view h2").textContent = known.name;
  find(".where").textContent = `page ${page.page + 1} of ${page.num_pages}, ${known.num_images} images` +
    (overview.is_sample ? " (sample)" : "") + (overview.score_name ? `, lowest ${overview.score_name} first` : "");
  if (page.real) {
    find(".real").replaceChildren(...page.real.filter(Boolean).map((url) => Object.assign(make("img"), { src: url, alt: "real image" })));
    find(".real-strip").hidden = !page.real.length;
  }
  find(".grid").replaceChildren(...page.images.map((image, number) => {
    const tile = make("div", "tile"), caption = make("div", "caption");
    tile.setAttribute("role", "option");
    tile.dataset.number = image.number;
    tile.title = image.title;
    if (image.picture) tile.append(Object.assign(make("img"), { src: image.picture, alt: image.title, draggable: false }));
    else tile.append(make("span", "broken", "cannot be opened"));
    caption.append(make("span", "", image.score === null ? image.title.split(" ").pop() : image.score.toFixed(3)), make("span", "mark"));
    tile.append(caption);
    tile.onclick = () => { select(number); give([number], verdictOf(image) === "reject" ? "accept" : "reject"); };
    return tile;
  }));
  page.images.forEach((_, number) => drawVerdict(number));
  for (const button of element.querySelectorAll(".class")) button.classList.toggle("open", Number(button.dataset.label) === page.label);
  if (isNewClass) find(".class.open").scrollIntoView({ block: "nearest" });
  selected = 0;
  select(place);
  show("grid");
  ahead.clear();
  if (page.page + 1 < page.num_pages) fetchAhead(page.label, page.page + 1);
}

function fetchAhead(label, page) {
  const asked = server.open_page({ label, page });
  asked.catch(() => {}); // asked again when it is needed
  ahead.set(`${label}:${page}`, asked);
}

async function openPage(label, page, place = 0) {
  try {
    const isNewClass = current?.label !== label;
    const asked = (!isNewClass && ahead.get(`${label}:${page}`)) || server.open_page({ label, page, with_real: isNewClass });
    drawPage(await asked, place);
  } catch (error) { fail(error); }
}

const openClass = (label) => openPage(label, null);

function turn(step) {
  if (!current) return;
  const page = current.page + step;
  if (page >= 0 && page < current.num_pages) return openPage(current.label, page);
  const labels = overview.classes.map((one) => one.label), place = labels.indexOf(current.label) + step;
  if (place >= 0 && place < labels.length) return openClass(labels[place]);
}

function give(places, verdict) {
  const images = places.map((place) => current.images[place]), before = images.map(verdictOf);
  if (!images.length) return;
  images.forEach((image) => said.set(image.number, verdict));
  places.forEach(drawVerdict); // at once; the save follows
  const page = current, began = performance.now();
  saving = saving.then(() => server.give({ numbers: images.map((image) => image.number), verdict })).then((progress) => {
    drawProgress(progress);
    find(".saved").textContent = `saved (${Math.round(performance.now() - began)} ms)`;
  }).catch((error) => {
    images.forEach((image, number) => said.set(image.number, before[number]));
    if (current === page) places.forEach(drawVerdict);
    fail(error);
  });
}

function acceptRest() {
  give(current.images.flatMap((image, place) => (verdictOf(image) ? [] : [place])), "accept");
}

function undo() {
  saving = saving.then(() => server.undo({})).then(async (undone) => {
    if (!undone) { find(".saved").textContent = "nothing to undo"; return; }
    said.clear();
    drawProgress(undone.progress);
    const page = await server.open_page({ label: undone.progress.label, page: undone.page, with_real: true });
    drawPage(page, page.images.findIndex((image) => image.number === undone.number));
    find(".saved").textContent = "undone";
  }).catch(fail);
}

async function enlarge() {
  try {
    find(".overlay img").src = await server.enlarge({ number: current.images[selected].number });
    find(".overlay").hidden = false;
  } catch (error) { fail(error); }
}

function columns() {
  const tiles = [...find(".grid").children];
  return tiles.filter((tile) => tile.offsetTop === tiles[0].offsetTop).length || 1;
}

async function openBlind(asked) {
  try {
    blind = await (asked || server.ask({}));
    blind.chosen = null;
    find(".blind-where").textContent = `${blind.num_answered} of ${overview.num_questions} answered`;
    find(".blind-done").hidden = blind.place !== undefined;
    find(".question").hidden = blind.place === undefined;
    find(".blind-picture").src = blind.picture || "";
    find(".blind-classes").replaceChildren(...blind.class_names.map((name, number) => {
      const button = make("button", "", number < 10 ? `${DIGITS[number]} ${name}` : name);
      button.onclick = () => { button.blur(); choose(number); };
      return button;
    }));
    show("blind");
  } catch (error) { fail(error); }
}

function choose(number) {
  if (number >= blind.class_names.length) return;
  blind.chosen = blind.class_names[number];
  [...find(".blind-classes").children].forEach((button, place) => button.classList.toggle("chosen", place === number));
}

function answer(said_real) {
  if (!blind || blind.place === undefined || blind.isSent) return;
  if (!blind.chosen) { find(".blind-where").textContent = "choose a class first"; return; }
  blind.isSent = true;
  openBlind(server.answer({ place: blind.place, said_class: blind.chosen, said_real }));
}

async function openSummary() {
  try {
    const summary = await server.summarise({});
    find(".summary-lines").replaceChildren(...summary.lines.map((line) => make("p", "", line)));
    const rows = [summary.heads, ...summary.rows].map((cells, number) => {
      const row = make("tr");
      row.append(...cells.map((cell) => make(number ? "td" : "th", "", cell)));
      return row;
    });
    find(".summary-table").replaceChildren(...rows);
    show("summary");
  } catch (error) { fail(error); }
}

function press(event) {
  if (!element.isConnected || event.ctrlKey || event.metaKey || event.altKey) return;
  if (!find(".overlay").hidden) { find(".overlay").hidden = true; event.preventDefault(); return; }
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const ofBlind = { r: () => answer(true), s: () => answer(false) };
  for (const digit of DIGITS) ofBlind[digit] = () => choose(DIGITS.indexOf(digit));
  const ofGrid = {
    ArrowRight: () => select(selected + 1), ArrowLeft: () => select(selected - 1),
    ArrowDown: () => select(selected + columns()), ArrowUp: () => select(selected - columns()),
    x: () => { give([selected], "reject"); select(selected + 1); },
    a: () => { give([selected], "accept"); select(selected + 1); },
    u: undo, z: enlarge, Enter: acceptRest, " ": () => turn(event.shiftKey ? -1 : 1),
  };
  const act = !find(".blind-view").hidden ? ofBlind[key] : !find(".grid-view").hidden && current ? ofGrid[key] : null;
  if (!act) return;
  event.preventDefault();
  act();
}

const onClick = (selector, act) => { find(selector).onclick = (event) => { event.currentTarget.blur(); act(); }; };
onClick(".previous", () => turn(-1));
onClick(".next", () => turn(1));
onClick(".accept-rest", acceptRest);
onClick(".undo", undo);
onClick(".to-blind", () => openBlind());
onClick(".to-summary", openSummary);
onClick(".say-real", () => answer(true));
onClick(".say-synthetic", () => answer(false));
onClick(".overlay", () => { find(".overlay").hidden = true; });
document.addEventListener("keydown", press);

server.overview({}).then((found) => {
  overview = found;
  find(".who").textContent = `Reviewer: ${found.reviewer}`;
  find(".to-blind").hidden = !found.num_questions;
  drawClasses();
  return openClass((found.classes.find((one) => one.num_reviewed < one.num_images) || found.classes[0]).label);
}).catch(fail);
