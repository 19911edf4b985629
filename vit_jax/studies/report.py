"""What studies show, as Markdown and as one HTML file: tables and figures."""
import base64
import html
import json
import os
import re
import shlex

import numpy as np

from vit_jax import workdir
from vit_jax.studies import analysis
from vit_jax.studies import figures
from vit_jax.studies import ledger
from vit_jax.studies import plan
from vit_jax.studies import spaces

STUDY = 'study.json'
TITLES = {
    'schedule_length': '1. Schedule length', 'optimizer': '2. AdamW or SGD',
    'edf': '3. Learning rate and weight decay', 'peak': '4. Best setting',
    'stems': '5. Stems', 'depth': '6. Depth'}
SCALES = {
    'digits': "scikit-learn's digits, 300 training images (30 a class), 500 "
              'test images',
    'cifar10': 'CIFAR-10',
    'imagenet': 'ImageNet-1k'}
PAPER = {
    'schedule_length': 'Paper, Table 2 (ImageNet, points lost by 100 of 400 '
        'epochs): patchify 5.5, 3.7, 2.0, 1.7, conv 3.9, 2.3, 1.4, 1.5 at 1, '
        '4, 18, 36 GF.',
    'optimizer': 'Paper, Table 3 (ImageNet, 4GF, 50 epochs): SGD loses 5.3 '
        'points with patchify, 0.7 with conv.',
    'edf': 'Paper, section 5.3 (ImageNet, 18GF, SGD): within 4 points of the '
        'best are 60 % of the runs with conv, fewer than 20 % with patchify.',
    'peak': 'Paper, Table 2 (ImageNet, 400 epochs): conv is better than '
        'patchify by 3.0, 1.0, 0.9, 1.4 points at 1, 4, 18, 36 GF.',
    'stems': 'Paper, Table 3 (ImageNet, 4GF, 50 epochs, AdamW / SGD error): '
        'conv 24.0 / 24.7, S1 24.3 / 25.1, S2 24.3 / 25.3, S3 25.1 / 26.2, S4 '
        '26.2 / 27.9, patchify 27.7 / 33.0.',
    'depth': 'Paper, Appendix B: with 48 blocks conv stays better and more '
        'stable; no numbers.'}


def describe(folder, argv, study):
  """Writes what a study is, and its command, beside its results."""
  os.makedirs(folder, exist_ok=True)
  text = json.dumps({
      'command': shlex.join(['vit-jax', *argv]),
      'environment': workdir.environment(),
      'study': json.loads(study.to_json())}, indent=1)
  with open(os.path.join(folder, STUDY), 'w', encoding='utf-8') as f:
    f.write(text + '\n')


def write(folder):
  """Writes report.md, report.html and the figures of all studies of a folder.

  Args:
    folder: of one study, or with studies below it.

  Returns:
    The paths of the two.

  Raises:
    ValueError: there is none.
  """
  found = [path for path in (folder, *(
      os.path.join(folder, name) for name in sorted(TITLES, key=TITLES.get)))
           if os.path.exists(os.path.join(path, STUDY))]
  if not found:
    raise ValueError(f'{folder} holds no study.\nGive the --dir of `vit-jax '
                     'study run`, or the folder of one study in it.')
  lines = ['# Studies']
  for path in found:
    lines += ['', *section(path, folder)]
  text = '\n'.join(lines) + '\n'
  paths = [os.path.join(folder, name) for name in ('report.md', 'report.html')]
  for path, content in zip(paths, (text, _as_html(text, folder)), strict=True):
    with open(path, 'w', encoding='utf-8') as f:
      f.write(content)
  return paths


def section(path, relative_to):
  """Markdown lines of a study; draws its figures."""
  with open(os.path.join(path, STUDY), encoding='utf-8') as f:
    about = json.load(f)
  study = about['study']
  rows = ledger.read_table(path)
  arms = [plan.Arm(*arm).label for arm in study['arms']]
  total = len(arms) * study['points']['count']
  env = about['environment']
  done = [arm for arm in arms if any(row['arm'] == arm for row in rows)]
  lines = [
      f'## {TITLES.get(study["name"], study["name"])}', '',
      f'{_data(study)}. {len(rows)} runs of '
      f'{total} are done' + (', THE REST IS MISSING' if len(rows) < total else
                             '') + '. '
      f'{env["device_count"]} x {env["device_kind"]}, JAX {env["jax"]}, Python '
      f'{env["python"]}, {env["time"][:10]}, source {env["git"]}, '
      f'{sum(r["seconds"] for r in rows) / 3600:.1f} h of runs.', '',
      f'    {about["command"]}', '']
  if not rows:
    return lines
  draw = {'edf': _edf, 'depth': _edf, 'schedule_length': _lengths,
          'optimizer': _lengths}.get(study['name'], _means)
  lines += draw(study['name'], path, rows, done, relative_to)
  lines += ['', *_differences(study['name'], rows, done)]
  if study['name'] in PAPER:
    lines += ['', PAPER[study['name']]]
  return lines


def _data(study):
  """What a study was trained on, in words."""
  text = SCALES.get(study['scale'], study['scale'])
  arm = plan.Arm(*study['arms'][0])
  if study['scale'] != 'digits' and (
      file := re.search(r'[:,]data=([^,]+)', arm.config)):
    text += f' ({os.path.basename(file[1])})'
    if count := dict(arm.changes).get('input.per_class'):
      text += f', {count:,} training images a class'
  return text


def _edf(name, path, rows, arms, relative_to):
  """Study 3: shares within points of the best; EDFs, scatter."""
  lines = ['| arm | runs | diverged | best error | median | within 1 | 2 | 4 '
           'points | best lr | best wd |', '|---' * 10 + '|']
  for arm in arms:
    own = [row for row in rows if row['arm'] == arm]
    errors = analysis.finite(analysis.errors_of(rows, arm).values())
    ranges = [analysis.best_range([r[k] for r in own], errors)
              for k in (spaces.LR, spaces.WD)]
    shares = [f'{analysis.within(errors, p):.0%}' for p in (1, 2, 4)]
    lines.append('| ' + ' | '.join([
        arm, str(len(errors)), str(np.isinf(errors).sum()),
        f'{errors.min():.2%}', f'{np.median(errors):.2%}', *shares,
        *(f'{low:.2g}-{high:.2g}' for low, high in ranges)]) + ' |')
  figures.edfs(os.path.join(path, f'{name}.png'), rows, arms)
  figures.scatter(os.path.join(path, f'{name}_scatter.png'), rows, arms,
                  (spaces.LR, spaces.WD))
  return [*lines, '', _image(path, f'{name}.png', relative_to), '',
          _image(path, f'{name}_scatter.png', relative_to)]


def _lengths(name, path, rows, arms, relative_to):
  """Studies 1 and 2: error by length, and its gap to the longest."""
  series = {}
  for arm in arms:
    label, epochs = re.fullmatch(r'(.*) ([\d.]+) epochs', arm).groups()
    series.setdefault(label, {})[float(epochs)] = arm
  errors = {arm: analysis.errors_of(rows, arm) for arm in arms}
  interval = {arm: analysis.mean_interval(list(errors[arm].values()))
              for arm in arms}
  lines = ['| arm | epochs | runs | diverged | error | 95 % | gap to the '
           'longest | 95 % |', '|---' * 8 + '|']
  for label, by_epochs in series.items():
    longest = by_epochs[max(by_epochs)]
    for epochs in sorted(by_epochs):
      arm = by_epochs[epochs]
      gap = analysis.paired(errors[arm], errors[longest])
      mean, low, high = interval[arm]
      lost = np.isnan(list(errors[arm].values())).sum()
      lines.append(
          f'| {label} | {epochs:g} | {len(errors[arm])} | {lost} | {mean:.2%} '
          f'| {low:.2%}-{high:.2%} | ' + (
              '| |' if arm == longest else
              f'{100 * gap.mean:.2f} | {100 * gap.low:.2f} to '
              f'{100 * gap.high:.2f} |'))
  figures.lengths(os.path.join(path, f'{name}.png'), {
      label: {e: interval[arm] for e, arm in points.items()}
      for label, points in series.items()})
  return [*lines, '', _image(path, f'{name}.png', relative_to)]


def _means(name, path, rows, arms, relative_to):
  """Studies 4 and 5: means over seeds."""
  intervals = {}
  lines = ['| arm | runs | diverged | error | 95 % | sd |', '|---' * 6 + '|']
  for arm in arms:
    errors = np.array(list(analysis.errors_of(rows, arm).values()), float)
    good = errors[np.isfinite(errors)]
    intervals[arm] = mean, low, high = analysis.mean_interval(errors)
    sd = good.std(ddof=1) if len(good) > 1 else np.nan
    lines.append(f'| {arm} | {len(errors)} | {len(errors) - len(good)} | '
                 f'{mean:.2%} | {low:.2%}-{high:.2%} | {100 * sd:.2f} |')
  figures.means(os.path.join(path, f'{name}.png'), intervals)
  return [*lines, '', _image(path, f'{name}.png', relative_to)]


def _differences(name, rows, arms):
  """Paired comparisons: of stems at the same rest, and of optimizers."""
  lines = ['Paired differences in points (a positive one: the first has the '
           'larger error); "visible" is the smallest that this many pairs show '
           'in 80 % of repetitions:', '',
           '| first | second | pairs | lost | difference | 95 % | visible | |',
           '|---' * 8 + '|']
  pairs = []
  for arm in arms:
    words = arm.split(' ')
    if words[0] != 'conv' and name != 'optimizer':
      pairs.append((arm, ' '.join(['conv', *words[1:]])))
    if 'sgd' in words and name in ('optimizer', 'peak', 'stems'):
      pairs.append((arm, arm.replace('sgd', 'adamw')))
    if name == 'optimizer' and words[0] != 'conv':
      pairs.append((arm, ' '.join(['conv', *words[1:]])))
  for first, second in pairs:
    if second not in arms or first == second:
      continue
    found = analysis.paired(*(analysis.errors_of(rows, a)
                              for a in (first, second)))
    verdict = '' if found.resolved else 'not resolved at this scale'
    lines.append(
        f'| {first} | {second} | {found.pairs} | {found.lost} | '
        f'{100 * found.mean:+.2f} | {100 * found.low:+.2f} to '
        f'{100 * found.high:+.2f} | {100 * found.visible:.2f} | {verdict} |')
  return lines


def _image(path, name, relative_to):
  return f'![{name}]({os.path.relpath(os.path.join(path, name), relative_to)})'


_PAGE = """<!doctype html><meta charset="utf-8"><title>Studies</title><style>
body {{font: 15px/1.45 sans-serif; max-width: 62em; margin: 2em auto;
  padding: 0 1em; color: #111}}
table {{border-collapse: collapse; font-size: 13px; margin: 1em 0}}
td, th {{border-bottom: 1px solid #bbb; padding: .15em .7em; text-align: left}}
img {{max-width: 100%}} pre {{background: #f3f3f3; padding: .5em;
  white-space: pre-wrap}}
h2 {{break-before: auto; margin-top: 2em}} table, img {{break-inside: avoid}}
</style>{body}
"""


def _as_html(text, folder):
  """The Markdown that this module writes, as one page that holds its images."""
  blocks = []
  for block in re.split(r'\n{2,}', text):
    lines = block.strip('\n').split('\n')
    image = re.fullmatch(r'!\[(.*)\]\((.*)\)', block.strip())
    if image:
      with open(os.path.join(folder, image[2]), 'rb') as f:
        data = base64.b64encode(f.read()).decode()
      blocks.append(f'<p><img alt="{html.escape(image[1])}" '
                    f'src="data:image/png;base64,{data}">')
    elif block.startswith('#'):
      level = len(block) - len(block.lstrip('#'))
      blocks.append(
          f'<h{level}>{html.escape(block.lstrip("# "))}</h{level}>')
    elif block.startswith('    '):
      blocks.append(f'<pre>{html.escape(block.strip())}</pre>')
    elif block.startswith('|'):
      head, _, *body = ([html.escape(cell.strip())
                         for cell in line.strip('|').split('|')]
                        for line in lines)
      row = lambda cells, tag: '<tr>' + ''.join(
          f'<{tag}>{cell}</{tag}>' for cell in cells) + '</tr>'
      blocks.append('<table>' + row(head, 'th') + ''.join(
          row(cells, 'td') for cells in body) + '</table>')
    else:
      blocks.append(f'<p>{html.escape(block.strip())}</p>')
  return _PAGE.format(body='\n'.join(blocks))
