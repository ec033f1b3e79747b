// Sorts the examples; without it the page shows those drawn at random.
const list = document.getElementById('pairs');
const bar = document.querySelector('.orders');
const all = [...list.children];
const count = Number(list.dataset.count);
const by = (key, sign) => (a, b) => sign * (Number(a.dataset[key]) - Number(b.dataset[key]));
const orders = {
  gain: by('gain', -1),
  loss: by('gain', 1),
  ppo: by('ppo', -1),
  length: by('length', -1),
};

bar.hidden = false;
bar.addEventListener('click', (event) => {
  const button = event.target.closest('button');
  if (!button) return;
  const order = button.dataset.order;
  const sorted = orders[order] ? [...all].sort(orders[order]) : all;
  const shown = new Set(orders[order] ? sorted.slice(0, count) : all.filter((pair) => pair.dataset.drawn === '1'));
  list.append(...sorted);
  all.forEach((pair) => { pair.hidden = !shown.has(pair); });
  bar.querySelectorAll('button').forEach((other) => other.setAttribute('aria-pressed', other === button));
});
