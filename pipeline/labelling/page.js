// The labelling page. What a model or a person wrote reaches the page as text nodes, or as the HTML that the server has made of
// its Markdown and sanitised (labelling/markdown.py).
//
// Gradio loads the page anew by itself, when it has lost the server and found it again, and a person may, too. So the tab
// remembers who is judging, and what was chosen and is not submitted yet.
const root = element.querySelector('.desk');
const state = { annotator: null, view: null, ranks: [], ratings: {}, focus: 0, aspect: null, busy: false };

function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function button(className, text, title, act) {
  const node = make('button', className, text);
  node.type = 'button';
  node.title = title;
  node.addEventListener('click', act);
  return node;
}

// Where what happened is said, read aloud by screen readers.
function messageLine() {
  const line = make('div', 'message');
  line.setAttribute('role', 'status');
  line.setAttribute('aria-live', 'polite');
  return line;
}

// A text as it reads, and, hidden until `r` is pressed, as it was written.
function prose(text, html) {
  const box = make('div', 'prose');
  if (!text.trim()) {
    box.append(make('span', 'empty', '(empty)'));
    return box;
  }
  const written = make('div', 'written', text);
  written.dir = 'auto';
  if (html) {
    const rendered = make('div', 'rendered');
    rendered.dir = 'auto';
    rendered.innerHTML = html;
    box.append(rendered);
  }
  box.append(written);
  return box;
}

function toggleRaw() {
  const raw = root.classList.toggle('raw');
  const marks = root.querySelector('.raw-text');
  if (marks) marks.setAttribute('aria-pressed', raw);
}

// Open until the first judgement; then as the annotator left them.
function guidelinesBox(view) {
  const box = make('details', 'guidelines');
  const opened = sessionStorage.getItem('tieback-guidelines');
  box.open = opened === null ? !view.progress.done : opened === view.guidelines.version;
  box.addEventListener('toggle', () => sessionStorage.setItem('tieback-guidelines', box.open ? view.guidelines.version : ''));
  box.append(make('summary', '', 'Guidelines'), prose(view.guidelines.text, view.guidelines.html));
  return box;
}

function say(message, isError) {
  const line = root.querySelector('.message');
  line.textContent = message || '';
  line.classList.toggle('error', Boolean(isError));
}

function remember() {
  const { item_id, side_by_side, responses } = state.view;
  // A side once chosen shows nowhere on the page: it must not come back unseen.
  const ranks = side_by_side ? responses.map(() => null) : state.ranks;
  const note = root.querySelector('.note').value;
  sessionStorage.setItem('tieback-draft', JSON.stringify({ item_id, ranks, ratings: state.ratings, note }));
}

function recall(view) {
  const draft = JSON.parse(sessionStorage.getItem('tieback-draft'));
  return draft && draft.item_id === view.item_id ? draft : null;
}

async function ask(call) {
  if (state.busy) return;
  state.busy = true;
  try {
    const reply = await call();
    if (reply.error) say(reply.error, true);
    else show(reply);
  } catch (error) {
    say('Not saved: the server does not answer. What you chose is still here; start the server again and press Enter.', true);
  } finally {
    state.busy = false;
  }
}

function show(view) {
  const earlier = recall(view) || view.earlier || {};
  state.view = view;
  state.focus = 0;
  state.aspect = null;
  if (!view.finished) {
    state.ranks = earlier.ranks || view.responses.map(() => null);
    state.ratings = earlier.ratings || {};
  }
  draw(earlier.note || '');
  window.scrollTo({ top: 0 });
  if (view.earlier) say('Taken back. Change it, and press Enter to submit it again.');
}

function start(annotator) {
  state.annotator = annotator;
  localStorage.setItem('tieback-annotator', annotator);
  sessionStorage.setItem('tieback-annotator', annotator);
  return ask(() => server.start({ annotator }));
}

function leave() {
  ['tieback-annotator', 'tieback-draft', 'tieback-guidelines'].forEach((key) => sessionStorage.removeItem(key));
  drawName();
}

function submit(flag) {
  const view = state.view;
  if (!view || view.finished) return;
  if (!flag && state.ranks.some((rank) => rank === null)) {
    say(view.side_by_side ? 'Choose the left, the right or a tie.' : 'Rank every response first: 1 is the best, equal digits tie.', true);
    return;
  }
  const answer = { ranks: state.ranks, ratings: state.ratings, flag: flag || null, note: root.querySelector('.note').value };
  return ask(async () => {
    const reply = await server.judge({ annotator: state.annotator, item_id: view.item_id, answer });
    if (!reply.error) {
      sessionStorage.removeItem('tieback-draft');
      if (!view.progress.done) sessionStorage.setItem('tieback-guidelines', '');
    }
    return reply;
  });
}

function undo(count) {
  if (state.annotator) return ask(() => server.undo({ annotator: state.annotator, count }));
}

function undoSeveral() {
  const reply = window.prompt('How many of your last judgements are to be taken back?', '5');
  if (reply === null) return;
  if (/^[1-9]\d{0,8}$/.test(reply.trim())) return undo(Number(reply));
  say('Enter a whole number from 1.', true);
}

function rank(index, value) {
  state.ranks[index] = value;
  state.aspect = null;
  const next = state.ranks.findIndex((rank) => rank === null);
  focusOn(next < 0 ? index : next);
  remember();
  say(next < 0 ? 'Press Enter to submit.' : '');
}

function choose(ranks) {
  state.ranks = ranks;
  return submit();
}

function rate(index, aspect, value) {
  state.ratings[aspect] = state.ratings[aspect] || state.view.responses.map(() => null);
  state.ratings[aspect][index] = state.ratings[aspect][index] === value ? null : value;
  state.aspect = null;
  refresh();
  remember();
}

function focusOn(index) {
  const cards = root.querySelectorAll('.response');
  state.focus = Math.max(0, Math.min(index, cards.length - 1));
  refresh();
  if (cards[state.focus]) cards[state.focus].scrollIntoView({ block: 'nearest' });
}

// Bring marks in line with the state, without touching the texts (whose scrolling must stay).
function refresh() {
  root.querySelectorAll('.response').forEach((card, index) => {
    card.classList.toggle('focused', index === state.focus && !state.view.side_by_side);
    card.querySelectorAll('.rank').forEach((chip) => {
      const chosen = Number(chip.textContent) === state.ranks[index];
      chip.classList.toggle('chosen', chosen);
      chip.setAttribute('aria-pressed', chosen);
    });
    card.querySelectorAll('.rating').forEach((chip) => {
      const { aspect, value } = chip.dataset;
      const chosen = (state.ratings[aspect] || [])[index] === Number(value);
      chip.classList.toggle('chosen', chosen);
      chip.setAttribute('aria-pressed', chosen);
    });
    card.querySelectorAll('.aspect').forEach((line) => {
      line.classList.toggle('waiting', index === state.focus && line.dataset.aspect === state.aspect);
    });
  });
}

function card(text, html, index) {
  const view = state.view;
  const box = make('section', 'response');
  box.addEventListener('click', () => { if (index !== state.focus) { state.focus = index; refresh(); } });
  const head = make('div', 'head');
  if (view.side_by_side) {
    head.append(make('h2', '', index ? 'Right' : 'Left'));
    head.append(button('better', 'This is better', index ? 'Key: → or 2' : 'Key: ← or 1', () => choose(index ? [2, 1] : [1, 2])));
  } else {
    head.append(make('h2', '', 'Response ' + 'ABCDEFGHIJKLMNOPQRSTUVWXYZ'[index % 26]));
    const chips = make('div', 'chips');
    chips.append(make('span', 'hint', 'rank'));
    view.responses.forEach((_, place) => {
      chips.append(button('rank', String(place + 1), place ? 'Rank ' + (place + 1) : 'Rank 1: best', () => rank(index, place + 1)));
    });
    head.append(chips);
  }
  box.append(head);
  const scroll = make('div', 'scroll');
  scroll.tabIndex = 0;
  scroll.append(prose(text, html));
  box.append(scroll);
  const ratings = make('div', 'ratings');
  view.aspects.forEach((aspect) => {
    const line = make('div', 'aspect');
    line.dataset.aspect = aspect;
    line.append(make('span', 'hint', aspect));
    const chips = make('div', 'chips');
    for (let value = 1; value <= view.max_rating; value += 1) {
      const chip = button('rating', String(value), aspect + ' ' + value + ' of ' + view.max_rating, () => rate(index, aspect, value));
      chip.dataset.aspect = aspect;
      chip.dataset.value = value;
      chips.append(chip);
    }
    line.append(chips);
    ratings.append(line);
  });
  box.append(ratings);
  return box;
}

function draw(note) {
  const view = state.view;
  root.replaceChildren();
  const progress = make('div', 'progress');
  const share = view.progress.total ? view.progress.done / view.progress.total : 1;
  const bar = make('div', 'bar');
  const filled = make('div', 'filled');
  filled.style.width = 100 * share + '%';
  bar.append(filled);
  progress.append(bar, make('span', 'count', view.progress.done + ' of ' + view.progress.total), button('who', state.annotator, 'Someone else judges', leave));
  root.append(progress);
  if (view.finished) {
    root.append(make('h1', 'title', 'All done. Thank you.'));
    root.append(make('p', 'hint', 'Nothing is left for you in this file. u takes the last judgement back, U several.'));
    root.append(messageLine());
    return;
  }
  root.append(make('h1', 'title', view.side_by_side ? 'Which response is better?' : 'Rank the responses'));
  if (view.guidelines) root.append(guidelinesBox(view));
  const prompt = make('div', 'prompt');
  view.prompt.forEach((message, index) => {
    const turn = make('div', 'turn ' + message.role);
    turn.append(make('div', 'hint', message.role), prose(message.content, view.prompt_html[index]));
    prompt.append(turn);
  });
  root.append(prompt);
  const responses = make('div', view.side_by_side ? 'responses pair' : 'responses');
  view.responses.forEach((text, index) => responses.append(card(text, view.responses_html[index], index)));
  root.append(responses);

  const foot = make('div', 'foot');
  const noteBox = make('input', 'note');
  noteBox.placeholder = 'Note (optional)';
  noteBox.value = note;
  noteBox.addEventListener('input', remember);
  noteBox.setAttribute('aria-label', 'Note');
  foot.append(noteBox);
  const actions = make('div', 'actions');
  if (view.side_by_side) actions.append(button('tie', 'Tie', 'Key: t or 0', () => choose([1, 1])));
  else actions.append(button('submit', 'Submit', 'Key: Enter', () => submit()));
  actions.append(button('undo', 'Undo', 'Key: u', () => undo(1)));
  actions.append(button('undo', 'Undo several', 'Key: U', undoSeveral));
  const rawText = button('raw-text', 'Raw text', 'Key: r', toggleRaw);
  rawText.setAttribute('aria-pressed', root.classList.contains('raw'));
  actions.append(rawText);
  view.flags.forEach((flag) => actions.append(button('flag', flag, 'Key: ' + FLAG_KEYS[flag], () => submit(flag))));
  foot.append(actions, messageLine());
  foot.append(make('div', 'keys hint', view.side_by_side
    ? '← or 1 left · → or 2 right · t or 0 tie · a all bad · u undo · U undo several · s skip · x unsafe · b broken · n note · r raw text'
    : 'digits rank, 1 best, equal ties · ↑ ↓ move · Enter submit · a all bad · u undo · U undo several · s skip · x unsafe · b broken · n note · r raw text · q, c, h then a digit rate'));
  root.append(foot);
  refresh();
}

function drawName() {
  state.view = null;
  const form = make('form', 'name');
  form.append(make('h1', 'title', 'Who is judging?'), make('p', 'hint', 'Your name stands beside each judgement, and brings you back to where you stopped.'));
  const field = make('input', '');
  field.value = localStorage.getItem('tieback-annotator') || '';
  field.maxLength = 64;
  field.setAttribute('aria-label', 'Your name');
  const go = make('button', 'submit', 'Start');
  go.type = 'submit';
  form.append(field, go, messageLine());
  form.addEventListener('submit', (event) => {
    event.preventDefault();
    const name = field.value.trim();
    if (name) start(name);
    else say('Enter a name.', true);
  });
  root.replaceChildren(form);
  field.focus();
}

const FLAG_KEYS = { 'all bad': 'a', skip: 's', unsafe: 'x', broken: 'b' };
const MOVES = ['ArrowDown', 'ArrowUp', 'j', 'k'];
const ASPECT_KEYS = { q: 'quality', c: 'correctness', h: 'helpfulness' };

function onKey(event) {
  if (!document.body.contains(root)) { document.removeEventListener('keydown', onKey); return; }
  const inField = event.target.matches('input, textarea, select');
  if (event.isComposing || event.ctrlKey || event.metaKey || event.altKey || !state.view) return;
  if (inField) {
    if (event.key === 'Escape' || event.key === 'Enter') { event.target.blur(); event.preventDefault(); }
    return;
  }
  const view = state.view;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  // A key that is held down moves, and judges nothing.
  if (event.repeat && !MOVES.includes(key)) { event.preventDefault(); return; }
  const flag = Object.keys(FLAG_KEYS).find((name) => FLAG_KEYS[name] === key);
  if (key === 'u') { if (event.shiftKey) undoSeveral(); else undo(1); }
  else if (view.finished) return;
  else if (flag) submit(flag);
  else if (key === 'r') toggleRaw();
  else if (key === 'n') root.querySelector('.note').focus();
  else if (view.aspects.includes(ASPECT_KEYS[key])) { state.aspect = ASPECT_KEYS[key]; refresh(); }
  else if (state.aspect && /^[1-9]$/.test(key)) { if (Number(key) <= view.max_rating) rate(state.focus, state.aspect, Number(key)); }
  else if (view.side_by_side) {
    if (key === 'ArrowLeft' || key === '1') choose([1, 2]);
    else if (key === 'ArrowRight' || key === '2') choose([2, 1]);
    else if (key === 't' || key === '0') choose([1, 1]);
    else if (key === 'Enter') submit();
    else return;
  }
  else if (/^[1-9]$/.test(key) && Number(key) <= view.responses.length) rank(state.focus, Number(key));
  else if (key === 'ArrowDown' || key === 'j') focusOn(state.focus + 1);
  else if (key === 'ArrowUp' || key === 'k') focusOn(state.focus - 1);
  else if (key === 'Enter') submit();
  else return;
  event.preventDefault();
}

document.addEventListener('keydown', onKey);
drawName();
if (sessionStorage.getItem('tieback-annotator')) start(sessionStorage.getItem('tieback-annotator'));
