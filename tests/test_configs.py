"""The recipes: what configs/*.py hold, against the papers' tables; and smoke.

Sources: "Early Convolutions Help Transformers See Better" (arXiv 2106.14881)
and pycls; "How to train your ViT?" (arXiv 2106.10270), big_vision and the
release's index.csv.
"""
import glob
import math
import os

import numpy as np
import pytest

from tests import runs
from tests import test_config
from vit_jax import durations
from vit_jax import ema
from vit_jax import recipes
from vit_jax import schedules
from vit_jax import train

NAMES = sorted(os.path.basename(p).removesuffix('.py') for p in glob.glob(
    os.path.join(runs.ROOT, 'configs', '*.py')))


def load(name, args=None):
  return test_config.load(
      os.path.join(runs.ROOT, 'configs', f'{name}.py'), args)


# Arguments that build another model or augmentation; the defaults are there.
VARIANTS = [
    pytest.param(
        'vit_c_i1k', 'aug=rand,erasing=0.25,stochastic_depth=0.1,repeats=3',
        marks=pytest.mark.slow),
    *(pytest.param('vit_c_i1k', f'stem={stem}', marks=pytest.mark.slow)
      for stem in ('patchify', *recipes.ABLATION_STEMS)),
    *(pytest.param('augreg', f'model={m},aug=medium2,reg=0.1,wd=0.1',
                   marks=pytest.mark.slow)
      for m in ('R+Ti/16', 'R26+S/32', 'R50+B/16')),
    pytest.param('augreg', 'stem=conv', marks=pytest.mark.slow),
    pytest.param('vit_c_i21k', 'size=72GF', marks=pytest.mark.slow),
]


@pytest.mark.parametrize('name, args', [(n, '') for n in NAMES] + VARIANTS)
def test_smoke(name, args, cache, tmp_path):
  c = load(name, 'smoke' + (args and f',{args}'))
  c.compilation_cache = str(cache)
  results = train.train_and_evaluate(c, str(tmp_path))
  assert all(math.isfinite(v) for v in results.values())
  counts = [v for k, v in results.items() if k.endswith('/count')]
  assert counts and all(n in (12, 500) for n in counts)


@pytest.mark.parametrize('name', NAMES)
def test_the_docstring_has_command_and_arguments(name):
  with open(os.path.join(runs.ROOT, 'configs', f'{name}.py')) as f:
    text = f.read()
  docstring = text.split('"""')[1]
  assert f'--config configs/{name}.py' in docstring
  parsed = text.split('parse_args(')[1].split(')\n')[0]
  for argument in [w.split('=')[0].strip(' \n') for w in parsed.split(',')
                   if '=' in w]:
    assert argument.strip(' (') in docstring, argument


@pytest.mark.parametrize('stem, size, optimizer, settings, lr, wd', [
    # Table 4, left: all of it.
    ('patchify', '1GF', 'adamw', 'tuned', 2.0e-3, 0.20),
    ('patchify', '4GF', 'adamw', 'tuned', 2.0e-3, 0.20),
    ('patchify', '18GF', 'adamw', 'tuned', 1.0e-3, 0.24),
    ('conv', '1GF', 'adamw', 'tuned', 2.5e-3, 0.19),
    ('conv', '4GF', 'adamw', 'tuned', 1.0e-3, 0.24),
    ('conv', '18GF', 'adamw', 'tuned', 1.0e-3, 0.24),
    ('patchify', '1GF', 'sgd', 'tuned', 1.9, 1.3e-5),
    ('patchify', '4GF', 'sgd', 'tuned', 1.9, 1.3e-5),
    ('patchify', '18GF', 'sgd', 'tuned', 1.1, 1.2e-5),
    ('conv', '1GF', 'sgd', 'tuned', 1.9, 1.3e-5),
    ('conv', '4GF', 'sgd', 'tuned', 1.3, 2.2e-5),
    ('conv', '18GF', 'sgd', 'tuned', 1.1, 2.7e-5),
    # Section 6.
    ('conv', '18GF', 'adamw', 'simple', 1.0e-3, 0.24),
    ('conv', '36GF', 'adamw', 'simple', 6.0e-4, 0.28),
    ('patchify', '36GF', 'adamw', 'simple', 6.0e-4, 0.28),
])
def test_rates_of_vit_c(stem, size, optimizer, settings, lr, wd):
  c = load('vit_c_i1k', f'stem={stem},size={size},optimizer={optimizer},'
           f'settings={settings}')
  assert (c.optimizer.name, c.optimizer.lr, c.optimizer.weight_decay) == (
      optimizer, lr, wd)


@pytest.mark.parametrize('args, match', [
    ('optimizer=sgd', 'settings=tuned'),
    ('size=36GF,settings=tuned', 'settings=simple'),
    ('size=16GF,optimizer=sgd,settings=tuned', 'size=4GF'),
    ('stem=S2,size=18GF', 'size=4GF'),
    ('epochs=300', "Unknown value of epochs '300'"),
])
def test_what_the_paper_has_no_row_for(args, match):
  with pytest.raises(ValueError, match=match) as info:
    load('vit_c_i1k', args)
  assert str(info.value).count('\n') == 1


def test_recipe_of_vit_c():
  c = load('vit_c_i1k', 'epochs=50')
  assert (c.total_epochs, c.global_batch_size, c.input.epoch) == (
      50, 2048, 'floor')
  units = durations.Units.of(1_281_167, 2048, 'floor')
  total = durations.to_steps(c, 'total', units)
  assert total == 31_250
  rate = schedules.create(c.schedule, units, total)
  # Set once an epoch: pycls lr_fun_cos, warm-up of 5 epochs from 0.1.
  for epoch, factor in ((0, 0.1), (1, 0.28), (4, 0.82), (5, 1.0), (49, 1.0)):
    cosine = 0.995 * 0.5 * (1 + math.cos(math.pi * epoch / 50)) + 0.005
    for step in (epoch * 625, epoch * 625 + 624):
      np.testing.assert_allclose(rate(step), cosine * factor, rtol=1e-5)
  alpha = ema.create(c.ema, units, total, 5 * 625)
  np.testing.assert_allclose(alpha(19_200), 1.31e-2, rtol=2e-3)
  assert c.augment == 'autoaugment|pca_jitter(0.1)|mixup_cutmix(0.8, 1.0)'
  assert c.loss.to_dict() == dict(name='softmax_xent', label_smoothing=0.1)
  assert c.precise_bn.examples == 8192
  for size, group in (('1GF', 256), ('18GF', 128), ('36GF', 64)):
    assert load('vit_c_i1k', f'size={size}').model.batch_norm_group == group
  deit = load('vit_c_i1k', 'stem=patchify,size=18GF,aug=rand,erasing=0.25,'
              'stochastic_depth=0.1,repeats=3,ema=false')
  assert deit.augment == ("randaug(2, 9, 'timm')|pca_jitter(0.1)|"
                          'random_erasing(0.25)|mixup_cutmix(0.8, 1.0)')
  assert deit.input.repeats == 3 and deit.ema.name == 'none'
  assert deit.optimizer.weight_decay == 0.5  # Table 5


def test_recipe_of_vit_c_on_21k():
  c = load('vit_c_i21k')
  assert (c.total_epochs, c.global_batch_size) == (90, 4096)
  assert (c.optimizer.lr, c.optimizer.weight_decay) == (2e-3, 0.24)
  big = load('vit_c_i21k', 'size=72GF,stem_of=runs/36gf')
  assert (big.optimizer.lr, big.optimizer.weight_decay) == (1.2e-3, 0.15)
  assert big.init_from.run == 'runs/36gf' and big.frozen
  with pytest.raises(ValueError, match='stem_of=ITS_WORKDIR'):
    load('vit_c_i21k', 'size=72GF')


# The paper's table of section 3.3, and the released files' names.
@pytest.mark.parametrize('name, file, augment', [
    ('none', 'none', ''),
    ('light1', 'light0', 'randaug(2, 0)'),
    ('light2', 'light1', 'randaug(2, 10)|mixup(0.2)'),
    ('medium1', 'medium1', 'randaug(2, 15)|mixup(0.2)'),
    ('medium2', 'medium2', 'randaug(2, 15)|mixup(0.5)'),
    ('strong1', 'strong1', 'randaug(2, 20)|mixup(0.5)'),
    ('strong2', 'strong2', 'randaug(2, 20)|mixup(0.8)'),
])
def test_settings_of_augreg(name, file, augment):
  for aug in (name, f'file:{file}'):
    assert load('augreg', f'aug={aug}').augment == augment


def test_recipe_of_augreg():
  c = load('augreg', 'dataset=i21k,model=L/16')
  assert c.augment == 'randaug(2, 20)|mixup(0.5)'
  assert (c.model.dropout, c.model.stochastic_depth) == (0, 0)
  assert (c.optimizer.lr, c.optimizer.weight_decay) == (1e-3, 0.1)
  assert (c.optimizer.clip_norm, c.optimizer.decay) == (1, ('.*/kernel',))
  assert (c.global_batch_size, c.schedule.warmup_steps) == (4096, 10_000)
  assert (c.loss.name, c.model.head_bias) == ('sigmoid_xent', -10)
  c = load('augreg', 'model=R26+S/32,data=tfds:imagenet2012:5.1.0')
  assert (c.model.dropout, c.model.stochastic_depth) == (0.1, 0.1)
  assert c.model.stem == 'resnet' and c.model.head_bias == -6.9
  assert c.input.train_split == 'train[:99%]' and set(c.evaluators) == {
      'val', 'minival'}
  assert load('augreg', 'model=S/16,stem=conv').model.stem == 'conv'
  with pytest.raises(ValueError, match='no best setting for B/8 on i1k'):
    load('augreg', 'model=B/8')
  with pytest.raises(ValueError, match='30 epochs on ImageNet-21k only'):
    load('augreg', 'epochs=30')
  with pytest.raises(ValueError, match="Did you mean 'light"):
    load('augreg', 'aug=light')
