// Filters, charts, rows and clips of the page. The data is a JSON element; the library has set vegaEmbed.

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);

const ANY = "any"; // of a filter
const ALL = "all"; // of the parts: all languages, or all kinds of question
const BASELINES = { transformers: "var(--ink)", none: "var(--ink)", random: "var(--soft)", "uniform-stride": "var(--soft)" };
const WORDS = { transformers: "transformers, as it comes", none: "uncompressed" };
const LANGUAGES = new Intl.DisplayNames("en", { type: "language" });
const [SOUND_HEIGHT, STRIP_HEIGHT, BOX_HEIGHT] = [120, 36, 15]; // px

const LOOKS = {
  background: "transparent",
  font: "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif",
  view: { stroke: null },
  axis: {
    labelColor: "var(--soft)", titleColor: "var(--soft)", gridColor: "var(--grid)", domainColor: "var(--line)",
    tickColor: "var(--line)", labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal",
  },
};

const element = (tag, text = "", more = {}) => Object.assign(document.createElement(tag), { textContent: text }, more);
const number = (value, digits = 3) => (value == null ? "" : Number(value.toPrecision(digits)).toString());
const score = ([value, low, high]) =>
  value.toFixed(1) + (low == null ? "" : ` [${low.toFixed(1)}, ${high.toFixed(1)}]`);
const named = (series) => WORDS[series] ?? series;

function choices(select, pairs, wanted) {
  select.replaceChildren(...pairs.map(([value, words]) => element("option", words, { value })));
  select.value = pairs.some(([value]) => value === wanted) ? wanted : (pairs[0]?.[0] ?? "");
}

const charts = {}; // what is drawn, by its place

async function draw(id, spec, datasets, description) {
  charts[id]?.finalize();
  $(id).className = "chart";
  const looks = { renderer: "svg", actions: false, config: LOOKS };
  charts[id] = await vegaEmbed($(id), { ...spec, datasets, description }, looks);
  return charts[id].view;
}

function empty(id, words) {
  charts[id]?.finalize();
  $(id).replaceChildren(element("span", words));
  $(id).className = "chart empty";
}

// --- accuracy -------------------------------------------------------------------------------------------------------

let testbed; // the key of the one that is shown
let hidden = new Set(); // lines that are not ticked
let order; // of the table

const current = () => data.testbeds[testbed];
const metric = () => current().metrics[$("metric").value] ?? "Score";
const inSetting = () => data.points.filter((p) => p.testbed === testbed && p.setting === $("setting").value);

function colour(point) {
  const place = current().leaders.indexOf(point.series);
  return place >= 0 ? `var(--c${place})` : (BASELINES[point.method] ?? "var(--other)");
}

function shown() {
  const keeps = (name, value) => $(name).value === ANY || $(name).value === String(value);
  return inSetting().filter(
    (p) =>
      !hidden.has(p.series) && keeps("rate", p.rate) && keeps("stage", p.stage) && keeps("trained", p.trained) &&
      keeps("query_aware", p.query_aware),
  );
}

const scored = (p) => p.scores[$("part").value]?.[$("metric").value];

function partName(name) {
  if (name === ALL) return "all together";
  return testbed === "speech" ? LANGUAGES.of(name) : name;
}

function showTestbed(key) {
  testbed = key;
  hidden = new Set();
  order = { column: 1, up: current().error };
  choices($("metric"), Object.entries(current().metrics));
  choices($("setting"), current().settings.map((words) => [words, words]));
  showSetting();
}

function showSetting() {
  const points = inSetting();
  const values = (name) => [...new Set(points.map((p) => p[name]))].filter((value) => value != null);
  const any = (pairs) => [[ANY, "any"], ...pairs];
  const parts = [...new Set(points.flatMap((p) => Object.keys(p.scores)))];
  $("part-name").textContent = current().part[0].toUpperCase() + current().part.slice(1);
  choices($("part"), parts.map((name) => [name, partName(name)]), $("part").value);
  const rates = values("rate").sort((a, b) => b - a);
  choices($("rate"), any(rates.map((rate) => [String(rate), `${number(rate)} tokens/s asked for`])), $("rate").value);
  choices($("stage"), any(values("stage").map((name) => [name, name])), $("stage").value);
  for (const name of ["trained", "query_aware"])
    choices($(name), any([["true", "yes"], ["false", "no"]]), $(name).value);
  showMethods(points);
  showPoints();
}

function showMethods(points) {
  const rank = (p) => {
    const place = current().leaders.indexOf(p.series);
    return place >= 0 ? place : p.method in BASELINES ? 100 : 1000;
  };
  const lines = [...new Map(points.map((p) => [p.series, p])).values()];
  lines.sort((a, b) => rank(a) - rank(b) || a.series.localeCompare(b.series));
  $("methods").replaceChildren(
    ...lines.map((p) => {
      const label = element("label");
      const box = element("input", "", { type: "checkbox", value: p.series, checked: !hidden.has(p.series) });
      const dot = element("i");
      dot.style.background = colour(p);
      label.append(box, dot, named(p.series));
      return label;
    }),
  );
}

function showPoints() {
  document.querySelectorAll(".score-name").forEach((place) => (place.textContent = metric()));
  const time = $("time").value;
  const costs = {
    rate: (p) => [p.tokens_per_second, `${number(p.tokens_per_second)} audio tokens/s`],
    share: (p) => [p.share, `${number(p.share)} % of audio and video tokens`],
    [time]: (p) => [p.times[time]?.ms, `${number(p.times[time]?.ms)} ${data.times[time]}`],
  };
  const points = shown();
  const drawn = { "chart-cost": $("cost").value, "chart-time": time };
  const counts = {};
  for (const [id, cost] of Object.entries(drawn)) {
    const values = points.flatMap((p) => {
      const [x, words] = costs[cost](p);
      const found = scored(p);
      if (x == null || !found) return [];
      const [y, low, high] = found;
      const looks = { colour: colour(p), lead: current().leaders.includes(p.series), stage: p.stage };
      const texts = { method: named(p.series), cost: words, score: score(found) };
      texts.about = Object.values(texts).join(", ");
      const marks = { trained: p.trained, query_aware: p.query_aware };
      return [{ id: p.id, x, y, low, high, series: named(p.series), rate: p.rate, ...looks, ...marks, ...texts }];
    });
    counts[id] = values.length;
    if (!values.length) {
      empty(id, cost === time ? "No row that is shown has a measured time." : "No row is left by the filters.");
      continue;
    }
    const about = `${metric()} of ${values.length} points; the table below holds the same rows`;
    draw(id, data.charts[testbed][cost], { points: values }, about).then((view) =>
      view.addEventListener("click", (_, item) => item?.datum?.id != null && open(item.datum.id)),
    );
  }
  const [all, timed] = [counts["chart-cost"], counts["chart-time"]];
  const failed = points.filter((p) => p.status !== "ok").length;
  $("shown").textContent =
    `${all} of ${inSetting().length} rows are drawn, ${timed} of them have a measured time` +
    (failed ? `; ${failed} failed or ran out of memory and are in the table alone.` : ".");
  $("timed").textContent = data.timed[time] ? `Timed with ${data.timed[time]}.` : "";
  showRows(points);
}

function columns() {
  const time = $("time").value;
  const text = (name, of) => ({ name, of, show: of });
  const value = (name, of, show) => ({ name, of, show, number: true });
  return [
    text("Method", (p) => named(p.series)),
    value(metric(), (p) => scored(p)?.[0], (p) => (scored(p) ? score(scored(p)) : "")),
    value("Audio tokens/s", (p) => p.tokens_per_second, (p) => number(p.tokens_per_second)),
    value(data.times[time], (p) => p.times[time]?.ms, (p) => number(p.times[time]?.ms)),
    text("Stage", (p) => p.stage),
    text("Trained", (p) => (p.trained ? "yes" : "")),
    text("Sees question", (p) => (p.query_aware ? "yes" : "")),
    ...(inSetting().some((p) => p.row.seed) ? [text("Seed", (p) => String(p.row.seed ?? ""))] : []),
  ];
}

function showRows(points) {
  const all = columns();
  const head = element("tr");
  all.forEach((column, i) => {
    const cell = element("th", "", { scope: "col", className: column.number ? "number" : "" });
    const sorted = order.column === i;
    cell.ariaSort = sorted ? (order.up ? "ascending" : "descending") : "none";
    const button = element("button", column.name + (sorted ? (order.up ? " ↑" : " ↓") : ""), { type: "button" });
    button.addEventListener("click", () => {
      order = { column: i, up: sorted ? !order.up : true };
      showRows(points);
      $("rows").querySelectorAll("th button")[i].focus();
    });
    cell.append(button);
    head.append(cell);
  });
  const { of } = all[order.column] ?? all[1];
  const missing = (value) => value == null || value === "";
  const compare = (a, b) => {
    if (missing(of(a)) || missing(of(b))) return missing(of(a)) - missing(of(b));
    const difference = typeof of(a) === "number" ? of(a) - of(b) : of(a).localeCompare(of(b));
    return order.up ? difference : -difference;
  };
  const body = [...points].sort(compare).map((p) => {
    const line = element("tr");
    const dot = element("i");
    dot.style.background = colour(p);
    const opener = element("button", named(p.series), { type: "button" });
    opener.addEventListener("click", () => open(p.id));
    const first = element("td");
    first.append(dot, opener);
    line.append(first);
    if (p.status !== "ok") {
      line.append(element("td", `${p.status}: ${p.message}`, { colSpan: all.length - 1, className: "failed" }));
      return line;
    }
    for (const column of all.slice(1))
      line.append(element("td", column.show(p), { className: column.number ? "number" : "" }));
    return line;
  });
  $("rows").tHead.replaceChildren(head);
  $("rows").tBodies[0].replaceChildren(...body);
}

// --- one row --------------------------------------------------------------------------------------------------------

function fields(value) {
  if (Array.isArray(value)) return element("span", value.map((each) => (each === null ? "–" : plain(each))).join(", "));
  if (value === null || typeof value !== "object") return element("span", plain(value));
  const list = element("dl");
  for (const [name, each] of Object.entries(value)) {
    const place = element("dd");
    place.append(fields(each));
    list.append(element("dt", name.replaceAll("_", " ")), place);
  }
  return list;
}

function plain(value) {
  if (value === null) return "–";
  if (typeof value === "number" && !Number.isInteger(value)) return number(value, 5);
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

function open(id) {
  const p = data.points.find((each) => each.id === id);
  $("dialog-title").textContent = named(p.series);
  const words = [p.setting];
  if (p.status !== "ok") words.push(`${p.status}: ${p.message}`);
  for (const [key, time] of Object.entries(p.times))
    words.push(`${number(time.ms)} ${data.times[key]}, measured at ${number(100 * time.kept)} % of the audio tokens`);
  $("dialog-summary").textContent = words.join("; ");
  $("command").textContent = p.command;
  $("copy").textContent = "copy";
  $("source").textContent = `From ${p.source}.`;
  $("fields").replaceChildren(fields(p.row));
  $("dialog").showModal();
  $("dialog").scrollTop = 0;
}

$("copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText($("command").textContent);
    $("copy").textContent = "copied";
  } catch {
    getSelection().selectAllChildren($("command")); // a browser may keep the clipboard from pages of no server
    $("copy").textContent = "selected";
  }
});
$("dialog").addEventListener("click", (event) => event.target === $("dialog") && $("dialog").close());

// --- clips ----------------------------------------------------------------------------------------------------------

let player; // the view of the clip's chart

function showClip() {
  const clip = data.clips[$("clip").value];
  const rates = [...new Set(clip.heard.map((each) => each.rate))].filter((rate) => rate != null).sort((a, b) => b - a);
  choices($("clip-rate"), rates.map((rate) => [String(rate), `${number(rate)} tokens/s`]), $("clip-rate").value || "6.25");
  $("audio").src = clip.audio;
  $("licence").textContent = `Recording: Asterisk's prompts (Debian ${clip.source}), joined and encoded as MP3.`;
  showHeard();
}

function showHeard() {
  const clip = data.clips[$("clip").value];
  const heard = clip.heard.filter((each) => each.rate == null || String(each.rate) === $("clip-rate").value);
  const top = (i) => SOUND_HEIGHT + (i + 1) * STRIP_HEIGHT - BOX_HEIGHT;
  const box = (i) => ({ top: top(i), bottom: top(i) + BOX_HEIGHT });
  const strips = heard.map((each, i) => {
    const name = `${named(each.method)}: ${each.spans.length} tokens, ${each.wer.toFixed(0)} % WER`;
    return { start: 0, end: clip.seconds, name, ...box(i) };
  });
  const tokens = heard.flatMap((each, i) =>
    each.spans.map(([start, end], k) => ({
      start, end: Math.min(end, clip.seconds), colour: `var(--${each.kind})`, shade: k % 2 ? 0.55 : 1, ...box(i),
    })),
  );
  const { url, start, end } = clip.picture;
  const height = top(heard.length - 1) + BOX_HEIGHT;
  const sound = [{ picture: url, start, end, top: 0, bottom: SOUND_HEIGHT, foot: height }];
  const spec = { ...data.charts.clips, height };
  draw("chart-tokens", spec, { sound, strips, tokens }, "Spectrogram, and each method's tokens").then((view) => {
    player = view;
    follow();
    view.addEventListener("click", (event) => {
      const left = view.container().querySelector("svg").getBoundingClientRect().left + view.origin()[0];
      seek(view.scale("x").invert(event.clientX - left));
    });
  });
  $("transcripts").replaceChildren(article("said", [["equal", clip.said, ""]]), ...heard.map(transcript));
}

function seek(second) {
  $("audio").currentTime = Math.min(Math.max(second, 0), $("audio").duration || 0);
  $("audio").play();
}

function follow() {
  player?.signal("second", $("audio").currentTime).runAsync();
  if (!$("audio").paused) requestAnimationFrame(follow);
}

function article(title, runs, note = "") {
  const made = element("article");
  const head = element("h4", title);
  head.append(element("span", note));
  const text = element("p", "", { tabIndex: 0 });
  for (const [kind, said, heard] of runs) {
    if (kind === "equal") text.append(said, " ");
    if (kind === "delete" || kind === "substitute") text.append(element("del", said), " ");
    if (kind === "insert" || kind === "substitute") text.append(element("ins", heard), " ");
  }
  made.append(head, text);
  return made;
}

function transcript(each) {
  const note = `${number(each.tokens_per_second)} tokens/s, ${each.wer.toFixed(1)} % WER`;
  return article(named(each.method), each.runs, note + (each.ended ? "" : ", never ended: stopped"));
}

// --- start ----------------------------------------------------------------------------------------------------------

const testbeds = Object.entries(data.testbeds).filter(([, each]) => each.settings.length);
if (testbeds.length) {
  $("testbeds").replaceChildren(
    ...testbeds.map(([key, each], i) => {
      const label = element("label");
      const radio = element("input", "", { type: "radio", name: "testbed", value: key, checked: i === 0 });
      radio.addEventListener("change", () => showTestbed(key));
      label.append(radio, each.name);
      return label;
    }),
  );
  choices($("time"), Object.entries(data.times));
  $("setting").addEventListener("change", showSetting);
  for (const id of ["metric", "part", "rate", "stage", "trained", "query_aware", "cost", "time"])
    $(id).addEventListener("change", showPoints);
  $("methods").addEventListener("change", ({ target }) => {
    target.checked ? hidden.delete(target.value) : hidden.add(target.value);
    showPoints();
  });
  const tick = (keep) => {
    hidden = new Set(inSetting().filter((p) => !keep(p)).map((p) => p.series));
    showMethods(inSetting());
    showPoints();
  };
  $("all").addEventListener("click", () => tick(() => true));
  $("few").addEventListener("click", () => tick((p) => current().leaders.includes(p.series) || p.method in BASELINES));
  $("no").addEventListener("click", () => tick(() => false));
  if (matchMedia("(max-width: 820px)").matches) $("methods-box").open = false;
  showTestbed(testbeds[0][0]);
} else {
  $("accuracy").replaceChildren(element("p", "There are no rows of accuracy yet."));
}

if (data.clips.length) {
  const count = {};
  const titles = data.clips.map(({ language, seconds }) => {
    count[language] = (count[language] ?? 0) + 1;
    return `${LANGUAGES.of(language)} ${count[language]}, ${seconds.toFixed(0)} s`;
  });
  choices($("clip"), titles.map((title, i) => [String(i), title]));
  $("clip").addEventListener("change", showClip);
  $("clip-rate").addEventListener("change", showHeard);
  for (const name of ["play", "pause", "seeked", "timeupdate"]) $("audio").addEventListener(name, follow);
  showClip();
} else {
  $("clips").hidden = true;
}
