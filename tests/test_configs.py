"""The recipes: what configs/*.py hold, against the papers' tables; and smoke.

Sources: "Early Convolutions Help Transformers See Better" (arXiv 2106.14881)
and pycls; "How to train your ViT?" (arXiv 2106.10270), big_vision and the
release's index.csv.
"""
import glob
import math
import os
import re

import jax
import numpy as np
import pytest

from tests import runs
from tests import test_config
from vit_jax import checkpoint
from vit_jax import durations
from vit_jax import ema
from vit_jax import models
from vit_jax import param_paths
from vit_jax import recipes
from vit_jax import schedules
from vit_jax import train
from vit_jax.pretrained import writers

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
    *(pytest.param('finetune', args, marks=pytest.mark.slow) for args in (
        'rule=bit,preset=pets,model=BiT-R50x1',
        'model=Mixer-B/16,tune=head', 'rule=vit_c_i21k,model=4GF,per_class=4',
        'model=R26+S/32,origin=timm,freeze=1', 'crop=resmall,layer_decay=0.75',
        'model=4GF,freeze=0', 'preset=cifar10,model=18GF,batch_norm=frozen')),
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


# Settings of AugReg, Table 4, and of the release; and what is chosen of them.
@pytest.mark.parametrize('preset, lengths, rates, split', [
    ('imagenet2012', {(20_000, 500)}, {.01, .03}, 'train[:99%]'),
    ('pets', {(500, 100), (2500, 200)}, {.001, .003, .01, .03}, 'train[:90%]'),
    ('flowers', {(500, 100), (2500, 200)}, {.001, .003, .01, .03},
     'train[:90%]'),
    ('cifar10', {(2500, 200), (10_000, 500)}, {.001, .003, .01, .03},
     'train[:98%]'),
    ('cifar100', {(2500, 200), (10_000, 500)}, {.001, .003, .01, .03},
     'train[:98%]'),
    ('resisc45', {(2500, 200), (10_000, 500)}, {.001, .003, .01, .03},
     'train[:60%]'),
])
def test_fine_tuning_grids(preset, lengths, rates, split):
  row = recipes.TRANSFER[preset]
  assert set(row.lengths) == lengths and set(row.rates) == rates
  with open(os.path.join(runs.ROOT, 'configs', 'finetune.py')) as f:
    line = next(x for x in f if re.match(rf'  (pets, )?{preset}[, ]', x))
  assert [float(x) for x in line.split(')')[-1].split()] == list(row.rates)
  for steps, warmup in lengths:
    assert f'{steps} ({warmup})' in line
    c = load('finetune', f'preset={preset},steps={steps}')
    assert (c.total_steps, c.schedule.warmup_steps) == (steps, warmup)
  assert c.input.source == 'tfds' and c.input.train_split == split
  assert c.optimizer.lr == row.rates[0]
  assert c.checkpoint.keep_best in ('val/top1', 'minival/top1')  # not the test


def test_recipe_of_fine_tuning():
  c = load('finetune', 'checkpoint=B_16.npz,data=/data/pets,res=384')
  assert c.optimizer.to_dict() | dict(decay=()) == dict(
      name='sgd', lr=.003, weight_decay=0, momentum=.9, nesterov=False,
      clip_norm=1, decay=(), layer_decay=1, momentum_dtype='float32')
  assert (c.global_batch_size, c.loss.name, c.loss.label_smoothing) == (
      512, 'softmax_xent', 0)
  assert (c.model.gelu, c.model.dropout, c.input.mean) == ('tanh', 0, (.5,))
  assert c.init_from.checkpoint == 'B_16.npz'
  assert c.init_from.reset == ('head/.*',)
  assert c.input.pp == 'decode|inception_crop(384)|flip_lr'
  assert c.input.eval_pp == 'decode|resize(384)'
  other = load('finetune', 'crop=resmall,res=384,data=tfds:a_name')
  assert other.input.pp == 'decode|resize_small(448)|pad_crop(384, 0)|flip_lr'
  assert other.input.eval_pp == 'decode|resize_small(448)|central_crop(384)'
  assert other.input.path == 'a_name'


@pytest.mark.parametrize('args, expected', [
    ('model=R26+S/32', ('resnet', 'tanh', 1e-6, .5)),
    ('model=B/16,origin=hf', ('patchify', 'erf', 1e-12, .5)),
    ('model=4GF', ('conv', 'erf', 1e-6, .485)),
    ('model=4GF,stem=patchify,origin=timm', ('patchify', 'erf', 1e-6, .5)),
    ('model=Mixer-B/16', (None, 'tanh', 1e-6, .5)),
    ('model=BiT-R50x1', (None, None, None, .5)),
])
def test_whose_weights(args, expected):
  c = load('finetune', args)
  assert (c.model.get('stem'), c.model.get('gelu'), c.model.get('norm_eps'),
          c.input.mean[0]) == expected


@pytest.mark.parametrize('args, steps, crop, mixup', [
    ('n=1000', 500, 'resize(448)|pad_crop(384, 0)', ''),
    ('preset=cifar10', 10_000, 'resize(160)|pad_crop(128, 0)', 'mixup(0.1)'),
    ('preset=cifar10,per_class=10', 500, 'resize(160)|pad_crop(128, 0)', ''),
    ('preset=imagenet2012', 20_000, 'resize(448)|pad_crop(384, 0)',
     'mixup(0.1)'),
    ('n=500000,res=480', 20_000, 'resize(512)|pad_crop(480, 0)', 'mixup(0.1)'),
])
def test_the_hyperrule(args, steps, crop, mixup):
  c = load('finetune', f'rule=bit,model=BiT-R50x1,{args}')
  assert (c.total_steps, c.augment) == (steps, mixup)
  assert c.input.pp == f'decode|{crop}|flip_lr'
  assert (c.optimizer.lr, c.optimizer.weight_decay, c.optimizer.clip_norm) == (
      .003, 0, 0)
  assert recipes.bit_crop(95, 96) == (160, 128)
  assert recipes.bit_crop(96, 96) == (448, 384)


def test_vit_c_from_21k_to_1k():
  c = load('finetune', 'rule=vit_c_i21k,preset=imagenet2012,model=18GF')
  pre = load('vit_c_i1k', 'size=18GF')
  assert (c.total_epochs, c.optimizer.weight_decay) == (20, 0)
  for key in ('augment', 'model', 'schedule', 'ema', 'loss', 'precise_bn',
              'global_batch_size'):
    assert c[key] == pre[key], key
  assert (c.input.pp, c.input.eval_pp) == (pre.input.pp, pre.input.eval_pp)
  assert c.checkpoint.keep_best == 'minival_ema/top1'


def test_what_is_not_trained():
  assert load('finetune').frozen == ()
  frozen = load('finetune', 'tune=head').frozen
  paths = ['stem/embedding/kernel', 'cls', 'encoder/block_00/mlp/fc1/kernel',
           'encoder/block_01/mlp/fc1/kernel', 'encoder/norm/scale',
           'head/kernel']
  left = lambda args: [p for p in paths if not param_paths.matches(
      p, load('finetune', args).frozen)]
  assert frozen and left('tune=head') == paths[-1:]
  assert left('freeze=0') == paths[2:]
  assert left('freeze=1') == paths[3:]
  assert load('finetune', 'batch_norm=frozen').model.batch_norm == 'frozen'


@pytest.mark.parametrize('args, match', [
    ('tune=head,freeze=1', 'Leave one of them out'),
    ('freeze=1,model=BiT-R50x1', 'what to freeze with --config'),
    ('rule=bit', 'Give n=NUMBER'),
    ('preset=kitti', 'Give data=FOLDER'),
    ('preset=pet', "Did you mean 'pets'"),
    ('model=Mixer-B/16,stem=conv', 'Leave stem out'),
    ('rule=dit', "Did you mean 'bit'"),
])
def test_what_cannot_be_fine_tuned(args, match):
  with runs.refused(match):
    load('finetune', args)


def test_fine_tuning_a_run(finished, cache, tmp_path):
  workdir, _ = finished
  tail = f'checkpoint={workdir},data=digits,classes=5-9,per_class=4'
  c = load('finetune', f'{tail},steps=2,batch=8,layer_decay=0.5')
  before = runs.config(cache)
  assert c.input.pp == before.input.pp and c.model.size == 'micro'
  assert c.input.mean == before.input.mean and c.model.pool == 'gap'
  c.compilation_cache = str(cache)
  results = train.train_and_evaluate(c, str(tmp_path / 'all'))
  assert results['test/count'] == 249
  # The head has five classes, and the rest began where the run had ended.
  old, new = runs.arrays(workdir), runs.arrays(str(tmp_path / 'all'))
  assert new["['params']['head']['kernel']"].shape == (64, 5)
  stem = "['params']['stem']['conv_0']['kernel']"
  np.testing.assert_allclose(
      new[stem], old[stem.replace("['params']", "['ema']['params']", 1)],
      atol=1e-3)
  with runs.refused('is a run here, with stem=conv'):
    load('finetune', f'{tail},stem=patchify')
  with runs.refused('stacked by model.scan'):
    load('finetune', f'{tail},freeze=1')
  assert load('finetune', f'{tail},model=micro,stem=conv,res=40').input.pp == (
      'decode|inception_crop(40)|flip_lr')


def test_fine_tuning_a_released_file(cache, tmp_path, capsys):
  """A head of 21 classes at 32 pixels, made one of 10 at 48."""
  model = models.create(size='mu/16', stem='patchify', num_classes=21)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
      lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), jax.eval_shape(
          lambda key: model.init(key, np.zeros((1, 32, 32, 3)), train=False),
          jax.random.key(0))['params'])
  file = tmp_path / 'mu_16.npz'
  np.savez(file, **writers.arrays(params, 'augreg'))
  c = load('finetune', f'checkpoint={file},model=mu/16,data=digits,res=48,'
           'steps=1,batch=8')
  c.compilation_cache = str(cache)
  train.train_and_evaluate(c, str(tmp_path / 'run'))
  out = capsys.readouterr().out
  assert 'pos_embedding 2x2 -> 3x3' in out
  assert 'reset: head/bias, head/kernel' in out
  new = runs.arrays(str(tmp_path / 'run'))
  np.testing.assert_array_equal(  # a head of zeros passes no gradient on
      new["['params']['stem']['embedding']['kernel']"],
      params['stem']['embedding']['kernel'])


@pytest.mark.parametrize('pool, extra', [('gap', 0), ('token', 1)])
def test_a_run_at_another_resolution(pool, extra, monkeypatch):
  """A grid of 4x4 made one of 7x5, as of a released file."""
  rng = np.random.default_rng(0)
  table = rng.normal(size=(1, extra + 16, 8)).astype(np.float32)
  monkeypatch.setattr(checkpoint, 'load_weights', lambda *_: {
      'params': {'pos_embedding': table}, 'batch_stats': {}})
  section = recipes.base().init_from
  section.run = 'runs/a'
  variables = {'params': {'pos_embedding': np.zeros((1, extra + 35, 8))}}
  given = checkpoint.init_from(section, variables, (7, 5))
  resized = given['params']['pos_embedding']
  assert resized.shape == (1, extra + 35, 8)
  np.testing.assert_array_equal(resized[:, :extra], table[:, :extra])
  corners = [0, 4, 30, 34]
  np.testing.assert_allclose(  # of aligned grids they are equal
      resized[0, extra:][corners], table[0, extra:][[0, 3, 12, 15]], rtol=1e-6)
  variables['params']['pos_embedding'] = np.zeros((1, extra + 35, 9))
  with runs.refused('List it in init_from.reset'):
    checkpoint.init_from(section, variables, (7, 5))


@pytest.mark.parametrize('optimizer', ['adamw', 'sgd'])
def test_frozen_parameters_have_no_optimizer_state(
    optimizer, finished, cache, tmp_path):
  c = load('finetune', f'checkpoint={finished[0]},data=digits,tune=head,'
           'steps=1,batch=8')
  if optimizer == 'adamw':
    c.optimizer = recipes.adamw(1e-3, 0.0)
  c.compilation_cache = str(cache)
  train.train_and_evaluate(c, str(tmp_path))
  saved = runs.arrays(str(tmp_path))
  moments = {k for k, v in saved.items() if 'opt_state' in k and v.size > 1}
  assert moments and all("['head']" in k for k in moments)
  assert all("['head']" in k for k in saved if k.startswith("['params']"))
  before = runs.arrays(finished[0])
  name = "['stem']['conv_0']['kernel']"
  np.testing.assert_array_equal(  # and do not move, nor do statistics
      saved[f"['frozen']{name}"], before[f"['ema']['params']{name}"])
  for k, v in saved.items():
    if k.startswith("['batch_stats']"):
      np.testing.assert_array_equal(v, before[f"['ema']{k}"])
