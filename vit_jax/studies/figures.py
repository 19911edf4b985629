"""Figures of studies: legible in print and for the colour-blind."""
import contextlib

import numpy as np

from vit_jax.studies import analysis

# Okabe and Ito's colours, in an order of falling contrast on white; with them
# go line styles and markers, for print.
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#000000', '#E69F00',
           '#56B4E9', '#999999')
STYLES = ('-', '--', '-.', ':')
MARKERS = 'osD^vPX*'
_EDF_POINTS = 10  # percentage points above the best, as in the paper


@contextlib.contextmanager
def figure(path, columns=1, rows=1, height=3.4):
  """Yields axes [rows, columns]; saves them at `path` as PNG."""
  import matplotlib
  matplotlib.use('Agg')
  from matplotlib import pyplot
  fig, axes = pyplot.subplots(
      rows, columns, squeeze=False, layout='constrained',
      figsize=(4.6 * columns, height * rows))
  try:
    yield axes
    for axis in axes.flat:
      axis.grid(alpha=0.25, linewidth=0.6)
      axis.spines[['top', 'right']].set_visible(False)
      handles, labels = axis.get_legend_handles_labels()
      if labels:
        axis.legend(handles, labels, frameon=False, fontsize=8)
    fig.savefig(path, dpi=150)
  finally:
    pyplot.close(fig)


def look(i):
  """Colour, line style and marker of the i-th arm."""
  return dict(color=COLOURS[i % len(COLOURS)], linestyle=STYLES[i % 4],
              marker=MARKERS[i % len(MARKERS)])


def edfs(path, rows, arms):
  """Distributions of errors above each optimizer's best, with bands.

  Args:
    path: of the PNG.
    rows: of a trials.csv.
    arms: their labels, '<stem> <optimizer>'; one panel an optimizer.
  """
  groups = {}
  for arm in arms:
    groups.setdefault(arm.rpartition(' ')[2], []).append(arm)
  with figure(path, len(groups)) as axes:
    for axis, (optimizer, members) in zip(axes[0], groups.items(), strict=True):
      for arm in members:
        errors = analysis.finite(analysis.errors_of(rows, arm).values())
        best = errors.min(initial=np.inf)
        if not np.isfinite(best):
          continue
        grid = best + np.linspace(0, 0.4, 400)
        style = look(arms.index(arm))
        style['marker'] = None
        share, (low, high) = (f(errors, grid) for f in (
            analysis.edf, analysis.edf_band))
        x = 100 * (grid - best)
        axis.step(x, share, where='post', label=f'{arm} (best {best:.1%})',
                  **style)
        axis.fill_between(x, low, high, step='post', alpha=0.15, linewidth=0,
                          color=style['color'])
      axis.axvspan(0, _EDF_POINTS, color='0.95', zorder=0)
      axis.set(xlabel="error above the arm's best (points)",
               ylabel='share of all runs', title=optimizer, ylim=(0, 1.02),
               xlim=(0, 40))


def scatter(path, rows, arms, keys):
  """Errors against each of `keys` and their product, with the best range.

  Args:
    path: of the PNG.
    rows: of a trials.csv.
    arms: labels; a row of panels each.
    keys: two columns.
  """
  names = [key.rpartition('.')[2] for key in keys]
  with figure(path, 3, len(arms), 2.6) as axes:
    for i, arm in enumerate(arms):
      own = [row for row in rows if row['arm'] == arm]
      errors = analysis.finite(
          [np.nan if r['diverged'] else r['test_error'] for r in own])
      first, second = (np.array([r[key] for r in own], float) for key in keys)
      for axis, values, name in zip(
          axes[i], (first, second, first * second),
          (*names, f'{names[0]} x {names[1]}'), strict=True):
        good = np.isfinite(errors)
        colour = look(i)['color']
        axis.plot(values[good], 100 * errors[good], linestyle='',
                  marker=look(i)['marker'], markersize=4, color=colour)
        for x in values[~good]:  # diverged: at the upper edge
          axis.plot(x, 0.98, marker='x', color=colour, clip_on=False,
                    transform=axis.get_xaxis_transform())
        if good.any():
          axis.axvspan(*analysis.best_range(values, errors), color=colour,
                       alpha=0.15, linewidth=0)
        axis.set(xscale='log', xlabel=name,
                 ylabel=f'{arm}\ntest error (%)' if name == names[0] else '')
        # Over less than two decades they would run into each other.
        axis.xaxis.set_minor_formatter('')


def lengths(path, series):
  """Errors against epochs with intervals.

  Args:
    path: of the PNG.
    series: {label: {epochs: (mean, low, high)}}.
  """
  with figure(path) as axes:
    axis = axes[0, 0]
    for i, (label, points) in enumerate(series.items()):
      x = sorted(points)
      mean, low, high = 100 * np.array([points[e] for e in x]).T
      axis.errorbar(x, mean, [mean - low, high - mean], capsize=2,
                    markersize=4, label=label, **look(i))
      axis.set_xticks(x, [f'{e:g}' for e in x])
    axis.set(xscale='log', xlabel='epochs', ylabel='test error (%)')
    axis.set_xticks(x, [f'{e:g}' for e in x])
    axis.minorticks_off()


def means(path, intervals):
  """A mean with its interval for each arm.

  Args:
    path: of the PNG.
    intervals: {arm: (mean, low, high)}.
  """
  with figure(path, height=0.6 + 0.3 * len(intervals)) as axes:
    axis = axes[0, 0]
    for i, (mean, low, high) in enumerate(intervals.values()):
      style = {**look(i), 'linestyle': ''}
      axis.errorbar(100 * mean, -i, xerr=100 * np.array(
          [[mean - low], [high - mean]]), capsize=3, **style)
    axis.set_yticks(-np.arange(len(intervals)), list(intervals))
    axis.set(xlabel='test error (%), mean and 95 % interval')
