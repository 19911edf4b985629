"""The papers' tables that configs choose from, and the parsing of arguments.

Configs import this module and ml_collections, nothing else.

Sources: "Early Convolutions Help Transformers See Better" (arXiv 2106.14881,
here: the paper) and its code, pycls.
"""
import json
import re
from typing import NamedTuple

from etils import epath
from ml_collections import ConfigDict

from vit_jax import choices

# Tuned at 50 epochs and reused at all lengths; lr for batch 2048.
# (stem, size) -> (AdamW lr, wd), (SGD lr, wd). The paper, Table 4 left.
TUNED = {
    ('patchify', '1GF'): ((2.0e-3, 0.20), (1.9, 1.3e-5)),
    ('patchify', '4GF'): ((2.0e-3, 0.20), (1.9, 1.3e-5)),
    ('patchify', '18GF'): ((1.0e-3, 0.24), (1.1, 1.2e-5)),
    ('conv', '1GF'): ((2.5e-3, 0.19), (1.9, 1.3e-5)),
    ('conv', '4GF'): ((1.0e-3, 0.24), (1.3, 2.2e-5)),
    ('conv', '18GF'): ((1.0e-3, 0.24), (1.1, 2.7e-5)),
}
# The settings that the authors recommend for re-use (AdamW). Section 6.
# The 72GF model's loss spiked at 36GF's decay, so it has less (Appendix C).
SIMPLE = {'1GF': (1.0e-3, 0.24), '4GF': (1.0e-3, 0.24), '16GF': (1.0e-3, 0.24),
          '18GF': (1.0e-3, 0.24), '36GF': (6.0e-4, 0.28),
          '72GF': (6.0e-4, 0.15)}
# Stems of the paper's ablations (Table 3, Figure 7), and the stem whose row of
# TUNED they take: their own tuned numbers are not in the paper.
ABLATION_STEMS = {'S1': 'conv', 'S2': 'conv', 'S3': 'conv', 'S4': 'conv',
                  'conv_ln': 'conv', 'patchify_bn': 'patchify'}
# Images whose BatchNorm statistics are taken together: those of one GPU in the
# authors' configs (8, 16 or 32 GPUs at batch 2048; 32 or 64 at 4096). For 16GF
# and 72GF we know of none and take those of 4GF (the same stem) and of 36GF.
BATCH_NORM_GROUP = {'1GF': 256, '4GF': 256, '16GF': 256, '18GF': 128,
                    '36GF': 64, '72GF': 64}
# Images on which they are estimated again before an evaluation (pycls).
PRECISE_BN = 8192

# AugReg ("How to train your ViT?", arXiv 2106.10270, section 3.3): RandAugment
# layers and magnitude, mixup alpha. light1 is not nothing: of its ops most do
# something at magnitude 0, too.
AUGREG = {'none': (0, 0, 0.0), 'light1': (2, 0, 0.0), 'light2': (2, 10, 0.2),
          'medium1': (2, 15, 0.2), 'medium2': (2, 15, 0.5),
          'strong1': (2, 20, 0.5), 'strong2': (2, 20, 0.8)}
# What the names of the released files call them: light1 is the paper's light2.
AUGREG_FILES = {'none': 'none', 'light0': 'light1', 'light1': 'light2',
                'medium1': 'medium1', 'medium2': 'medium2',
                'strong1': 'strong1', 'strong2': 'strong2'}
# The setting of each model: data set -> model -> (augmentation, dropout and
# stochastic depth, weight decay). i21k: the released checkpoint with the best
# validation accuracy. i1k: the best column of Figure 4 (300 epochs, minival),
# among equals the lightest; the figure does not say which decay, so it is the
# one that big_vision's configs have.
AUGREG_BEST = {
    'i21k': {
        'R+Ti/16': ('none', 0.0, 0.03), 'Ti/16': ('none', 0.0, 0.03),
        'S/32': ('none', 0.0, 0.1), 'S/16': ('light2', 0.0, 0.03),
        'B/32': ('light2', 0.0, 0.1), 'R26+S/32': ('light2', 0.0, 0.1),
        'B/16': ('medium1', 0.0, 0.1), 'B/8': ('medium2', 0.0, 0.1),
        'R50+L/32': ('medium1', 0.1, 0.1), 'L/16': ('strong1', 0.0, 0.1)},
    'i1k': {
        'R+Ti/16': ('light1', 0.0, 0.1), 'Ti/16': ('light1', 0.0, 0.1),
        'S/32': ('light2', 0.0, 0.1), 'S/16': ('medium2', 0.0, 0.1),
        'B/32': ('medium2', 0.1, 0.1), 'R26+S/32': ('medium1', 0.1, 0.1),
        'B/16': ('medium2', 0.1, 0.1), 'R50+L/32': ('medium2', 0.1, 0.1),
        'L/16': ('medium2', 0.1, 0.1)},
}

# pycls decays everything but norms and biases, so the class token and the
# position embedding too; big_vision decays kernels only.
DECAY_PAPER = (r'(.*/)?(kernel|cls|pos_embedding)',)
DECAY_KERNELS = (r'.*/kernel',)
# Per-channel mean and standard deviation of ImageNet, fractions, RGB.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Transfer(NamedTuple):
  """A data set to fine-tune on.

  Attributes:
    path: its name in TFDS; '' where that has no image with one class.
    train_split, eval_split: see `input_pipeline.tfds_source.open_splits`; the
      best checkpoint is the one that is best on the first.
    lengths: (steps, of which warm-up) at batch 512; the first is the default.
    rates: learning rates of AugReg's grid; the first is the default.
    num_train: training examples, num_classes: for BiT's rule.
    side: pixels of an image's sides, about, for BiT's crop.
  """
  path: str
  train_split: str
  eval_split: str
  lengths: tuple[tuple[int, int], ...]
  rates: tuple[float, ...]
  num_train: int
  num_classes: int
  side: int


# AugReg, Table 4, with the rate 0.03 that the released files add. The default
# is the one that big_vision's transfer.py found best for B/32, and 0.01, the
# ViT paper's for VTAB, where it says nothing. CIFAR-10, Flowers: the ViT paper,
# Table 4. Splits: AugReg section 3.1, vision_transformer configs/common.py.
_SHORT, _LONG = ((500, 100), (2500, 200)), ((10_000, 500), (2500, 200))
TRANSFER = {
    # Ours, for a folder of a few thousand photographs.
    'folder': Transfer(
        '', 'train', 'test', _SHORT, (0.003, 0.001, 0.01, 0.03), 0, 0, 400),
    'imagenet2012': Transfer(
        'imagenet2012', 'train[:99%]',
        'minival=train[99%:], val=validation', ((20_000, 500),), (0.03, 0.01),
        1_268_355, 1000, 400),
    'cifar10': Transfer(
        'cifar10', 'train[:98%]', 'val=train[98%:], test=test', _LONG,
        (0.003, 0.001, 0.01, 0.03), 49_000, 10, 32),
    'cifar100': Transfer(
        'cifar100', 'train[:98%]', 'val=train[98%:], test=test', _LONG,
        (0.01, 0.001, 0.003, 0.03), 49_000, 100, 32),
    'pets': Transfer(
        'oxford_iiit_pet', 'train[:90%]', 'val=train[90%:], test=test', _SHORT,
        (0.003, 0.001, 0.01, 0.03), 3312, 37, 400),
    'flowers': Transfer(
        'oxford_flowers102', 'train[:90%]', 'val=train[90%:], test=test',
        _SHORT, (0.003, 0.001, 0.01, 0.03), 918, 102, 500),
    'resisc45': Transfer(
        'resisc45', 'train[:60%]', 'val=train[60%:80%], test=train[80%:]',
        _LONG[::-1], (0.01, 0.001, 0.003, 0.03), 18_900, 45, 256),
    'kitti': Transfer(
        '', 'train', 'test', _SHORT, (0.01, 0.001, 0.003, 0.03), 6347, 4, 400),
    'vtab': Transfer(
        '', 'train', 'test', _SHORT[::-1], (0.01, 0.001, 0.003, 0.03), 1000, 0,
        200),
}

# Of weights: gelu, norm_eps, mean and standard deviation of their input.
HALF = (0.5,)
ORIGINS = {
    'augreg': ('tanh', 1e-6, HALF, HALF),  # and ViT, SAM, big_vision, Mixer
    'timm': ('erf', 1e-6, HALF, HALF),
    'hf': ('erf', 1e-12, HALF, HALF),
    'deit': ('erf', 1e-6, IMAGENET_MEAN, IMAGENET_STD),
    'torchvision': ('erf', 1e-6, IMAGENET_MEAN, IMAGENET_STD),
    'pycls': ('erf', 1e-6, IMAGENET_MEAN, IMAGENET_STD),
}
# Of the smaller side that an image is resized to, by the crop's.
_BEFORE_CROP = {128: 160, 224: 256, 480: 512}
# Crop: ops of training, ops of evaluation.
CROPS = {
    # vision_transformer, AugReg.
    'inception': ('inception_crop({res})', 'resize({res})'),
    # big_vision's transfer.py.
    'resmall': ('resize_small({large})|pad_crop({res}, 0)',
                'resize_small({large})|central_crop({res})'),
    # BiT.
    'square': ('resize({large})|pad_crop({res}, 0)', 'resize({res})'),
    # The paper's.
    'resized': ('random_resized_crop({res}, 8, 100)',
                "resize_small({large}, 'bilinear')|central_crop({res})"),
}


def base():
  """Every key of a run with its default; configs change what they mean to."""
  c = ConfigDict()
  # --- what is computed
  c.seed = 0          # initialisation, augmentation and dropout
  c.data_seed = -1    # order and host crops; -1: the same number as seed
  c.total_epochs = 50.0
  c.global_batch_size = 2048  # over all devices and processes

  c.input = dict(
      source='digits',  # digits | arrays | folder | tfds | packed | made
      path='',          # of the .npz file or the folder; tfds: name:version
      classes='',       # a classes.json that fixes the order of classes
      holdout=0.1,      # evaluation share where the data has no such part
      channels=3,
      epoch='exact',    # N/B steps; floor: N//B, the tail dropped (the paper)
      repeats=1,        # times in a row that an example comes (DeiT: 3)
      pp='decode',      # training images
      eval_pp='decode',
      mean=(0.5,), std=(0.5,),  # (x/255 - mean) / std, one or one a channel
      num_train=0,      # expected training examples; 0: as found
      num_classes=0,    # expected classes; 0: as found
      only_classes=(),  # names of classes, in the order wanted; (): all
      validation=0.0,   # share of the training examples to select on
      per_class=0,      # training examples of each, drawn by data_seed; 0: all
      max_bad_fraction=0.001,  # of training images that may be unreadable
      # Only source='tfds':
      data_dir='',      # where TFDS prepared it; '': TFDS's default
      train_split='train', eval_split='',  # '': validation or test
      stream=False,     # stream TFRecord files of a local disk, too
      window=16384,     # records within which a stream is shuffled
  )
  # In the training step: ops of vit_jax/augment, such as
  # 'randaug(2, 10)|mixup(0.2)'; '': none.
  c.augment = ''
  c.model = dict(
      size='4GF', stem='conv', pool='token', pre_logits=False,
      pos_embedding='learned', gelu='erf', norm_eps=1e-6, init='paper',
      head_bias=0.0, dropout=0.0, stochastic_depth=0.0, batch_norm='train',
      batch_norm_group=0,  # examples a BatchNorm statistic; 0: the batch
      conv='auto',      # of the stem: xla | im2col; auto: see population
      dtype='auto',     # of matmuls: bfloat16 on accelerators, float32 on CPU
      attention='auto',  # xla | cudnn | pallas; auto: pallas on TPUs, else xla
      scan=False, remat='none')
  c.loss = dict(name='softmax_xent', label_smoothing=0.1)
  c.optimizer = adamw(1e-3, 0.24)
  c.schedule = cosine(warmup_epochs=5.0)
  c.ema = dict(name='none')
  # Training examples on which BatchNorm's statistics are estimated again
  # before every evaluation; 0: running statistics.
  c.precise_bn = dict(examples=0)
  c.frozen = ()       # regexes of parameters that are not trained
  c.init_from = dict(
      run='',           # a workdir whose newest checkpoint gives weights
      weights='ema',    # ema | raw; ema falls back to raw where there is none
      checkpoint='',    # a released .npz, .safetensors or torch file instead
      resize='aligned',  # position embeddings: aligned (reference) | antialias
      channels='auto',  # auto | rgb | bgr: what the file was trained on
      paths=('.*',),    # regexes of the parameters taken
      reset=())         # regexes of those left at their initialisation
  # --- how it is done
  # Devices: replicas, those that share what a replica holds, those that share
  # heads and MLPs; -1: all others. See vit_jax/sharding.py.
  c.mesh = dict(data=-1, fsdp=1, tensor=1)
  c.accumulation_steps = 1  # micro-batches a step
  c.prefetch = 2      # batches ahead on the device
  c.augment_driver = 'auto'  # loop (for CPUs) | batched: the same bits
  c.augment_on = 'auto'      # what is on uint8: device | host, before it is
                             # sent; auto: host for TPUs
  c.log = dict(every_steps=50)
  c.eval = dict(every_epochs=1.0, batch_size=0)  # 0: the training batch
  c.evaluators = dict(test=dict(name='classification', split='test'))
  c.checkpoint = dict(every_epochs=1.0, keep_last=2, keep_best='test/top1')
  # Weights & Biases, beside metrics.jsonl; project '': not used.
  c.wandb = dict(project='', mode='online')  # online | offline
  c.compilation_cache = '~/.cache/vit_jax/xla'  # '': none
  return c


def mixer(size):
  """The section `model` of an MLP-Mixer: 'Mixer-S/32' .. 'Mixer-H/14'."""
  return ConfigDict(dict(
      size=size, gelu='tanh', norm_eps=1e-6, head_bias=0.0,
      stochastic_depth=0.0, dtype='auto', scan=False, remat='none'))


def bit(size):
  """The section `model` of a BiT ResNet: 'BiT-R50x1' .. 'BiT-R152x4'."""
  return ConfigDict(dict(
      size=size, head_bias=0.0, dtype='auto', remat='none'))


def adamw(lr, weight_decay, decay=DECAY_PAPER):
  """AdamW as in the paper: betas 0.9 / 0.999, no clipping."""
  return ConfigDict(dict(
      name='adamw', lr=lr, weight_decay=weight_decay, b1=0.9, b2=0.999,
      eps=1e-8, clip_norm=0.0, decay=decay, layer_decay=1.0,
      momentum_dtype='float32'))


def sgd(lr, weight_decay, decay=DECAY_PAPER):
  """SGD as in the paper: Nesterov momentum 0.9, coupled weight decay."""
  return ConfigDict(dict(
      name='sgd', lr=lr, weight_decay=weight_decay, momentum=0.9,
      nesterov=True, clip_norm=0.0, decay=decay, layer_decay=1.0,
      momentum_dtype='float32'))  # bfloat16 halves it


def cosine(warmup_epochs, **changes):
  """Half-period cosine after a linear warm-up, per step."""
  schedule = dict(
      name='cosine', warmup_epochs=warmup_epochs, warmup_start=0.0,
      cooldown_epochs=0.0, per='step', final=0.0, progress='after_warmup')
  return ConfigDict({**schedule, **changes})


def pycls_cosine():
  """The paper's schedule: set once an epoch, warm-up from 0.1, to 0.005."""
  return cosine(warmup_epochs=5.0, warmup_start=0.1, per='epoch', final=0.005,
                progress='from_start')


def staircase(warmup_steps, drops):
  """A linear warm-up, then a tenth of the rate after each drop (BiT).

  Args:
    warmup_steps: its length.
    drops: fractions of the run.
  """
  return ConfigDict(dict(
      name='staircase', warmup_steps=warmup_steps, warmup_start=0.0,
      cooldown_steps=0, per='step', drops=drops, drop_factor=0.1))


def bit_hyperrule(num_train):
  """BiT's rule for any data set, but for the crop (`bit_crop`).

  Source: arXiv 1912.11370, section 3.3, and big_transfer's bit_hyperrule.py.

  Args:
    num_train: training examples.

  Returns:
    (steps, steps of warm-up, fractions of the run after which the rate is
    divided by ten, mixup's alpha or 0).
  """
  if num_train < 20_000:
    return 500, 100, (0.4, 0.6, 0.8), 0.0
  if num_train < 500_000:
    return 10_000, 500, (0.3, 0.6, 0.9), 0.1
  return 20_000, 500, (0.3, 0.6, 0.9), 0.1


def bit_crop(height, width):
  """(side to resize to, side of the random crop) for images of a size.

  The paper's sides. Its code has 512 and 480 for the larger images, which the
  paper has for BiT-R152x4 only.
  """
  return (160, 128) if height * width < 96 * 96 else (448, 384)


def crop(c, name, res):
  """Sets how images are cropped to a size, and flipped.

  Args:
    c: config.
    name: a key of `CROPS`.
    res: pixels of the sides.
  """
  large = _BEFORE_CROP.get(res, round(res * 7 / 6))
  train, evaluate = (part.format(res=res, large=large) for part in CROPS[name])
  c.input.pp = f'decode|{train}|flip_lr'
  c.input.eval_pp = f'decode|{evaluate}'


def is_run(path):
  """Whether a path is the workdir of a run."""
  return bool(path) and (epath.Path(path) / 'config.json').exists()


def model_of_run(c, workdir):
  """Gives a config the model of a run, and what it is fed with.

  Without its dropout, stochastic depth, head bias and dense layer before the
  head, as models are fine-tuned.

  Args:
    c: config.
    workdir: of the run.
  """
  run = ConfigDict(json.loads(
      (epath.Path(workdir) / 'config.json').read_text()))
  c.model = run.model
  for key in ('dropout', 'stochastic_depth', 'head_bias'):
    if key in c.model:
      c.model[key] = 0.0
  if 'pre_logits' in c.model:
    c.model.pre_logits = False
  c.input.mean, c.input.std = tuple(run.input.mean), tuple(run.input.std)
  for key in ('channels', 'pp', 'eval_pp'):
    c.input[key] = run.input[key]


def freeze(c, tune, blocks):
  """Sets what is not trained.

  Args:
    c: config, with its model.
    tune: 'all' or 'head', a linear probe.
    blocks: how many of the first blocks are frozen, with all before them; -1:
      not even the stem.

  Raises:
    ValueError: both, or blocks that have no names of their own.
  """
  if tune == 'head' and blocks >= 0:
    raise ValueError('tune=head freezes all blocks, and freeze is given, too.\n'
                     'Leave one of them out.')
  if tune == 'head':
    c.frozen = ('(?!head/).*',)
  if blocks < 0:
    return
  if c.model.size.startswith('BiT') or (blocks and c.model.scan):
    raise ValueError(
        f'freeze={blocks} cannot tell the blocks of this model apart (it is a '
        'BiT, or its blocks are stacked by model.scan).\n'
        'Say what to freeze with --config.frozen, or leave freeze out.')
  c.frozen = (r'(stem/.*|cls|pos_embedding)', *(
      rf'(encoder/)?block_{i:02d}/.*' for i in range(blocks)))


def class_names(text):
  """The names that an argument lists: 'cat+dog', or '0-4' for five numbers."""
  if match := re.fullmatch(r'(\d+)-(\d+)', text):
    return tuple(map(str, range(int(match[1]), int(match[2]) + 1)))
  return tuple(filter(None, text.split('+')))


def vit_c_rates(stem, size, optimizer, settings):
  """(lr, weight decay) of the paper, for batch 2048.

  Args:
    stem: 'conv', 'patchify' or a key of `ABLATION_STEMS`.
    size: '1GF' to '36GF'; 'micro' is given the numbers of 1GF.
    optimizer: 'adamw' or 'sgd'.
    settings: 'simple' (section 6) or 'tuned' (Table 4).

  Raises:
    ValueError: the paper has no such row.
  """
  if stem in ABLATION_STEMS and size not in ('4GF', 'micro'):
    raise ValueError(
        f'The paper has no stem={stem} at size={size}.\n'
        f'Take size=4GF, or stem=conv or patchify.')
  row = '1GF' if size == 'micro' else size
  if settings == 'simple':
    if optimizer != 'adamw':
      raise ValueError(
          f'The simple settings (section 6) have no row for {optimizer}.\n'
          f'Take optimizer=adamw, or settings=tuned with size=4GF.')
    return SIMPLE[row]
  pair = TUNED.get((ABLATION_STEMS.get(stem, stem), row))
  if not pair:
    raise ValueError(
        f'The tuned settings (Table 4) have no row for size={size}.\n'
        f'Take settings=simple, or size=4GF.')
  return pair[('adamw', 'sgd').index(optimizer)]


def vit_c_augment(aug='auto', erasing=0.0):
  """The line `augment` of the paper's recipe, or of its Table 5.

  Args:
    aug: 'auto', or 'rand': timm's RandAugment as DeiT has it.
    erasing: probability of random erasing; DeiT has 0.25.
  """
  ops = ['autoaugment' if aug == 'auto' else "randaug(2, 9, 'timm')",
         'pca_jitter(0.1)', f'random_erasing({erasing})' if erasing else '',
         'mixup_cutmix(0.8, 1.0)']
  return '|'.join(filter(None, ops))


def augreg_setting(dataset, model, epochs=300, aug='best', reg='best',
                   wd='best'):
  """What an AugReg setting stands for.

  Args:
    dataset: 'i1k' or 'i21k'.
    model: such as 'B/16'.
    epochs: 300 or 30.
    aug: a key of `AUGREG`, 'file:' and a key of `AUGREG_FILES`, or 'best'.
    reg: dropout and stochastic depth, as text, or 'best'.
    wd: weight decay, as text, or 'best'.

  Returns:
    (RandAugment layers, magnitude, mixup alpha, dropout and stochastic depth,
    weight decay).

  Raises:
    ValueError: unknown `aug`, 'best' where the paper does not tell it, or a
      length that it does not have.
  """
  if (dataset, epochs) == ('i1k', 30):
    raise ValueError('AugReg trained 30 epochs on ImageNet-21k only.\n'
                     'Take epochs=300, or dataset=i21k.')
  table = AUGREG_BEST[dataset]
  # No AugReg models, but of the same release.
  row = {'R26+B/32': 'B/32', 'R50+B/16': 'B/16'}.get(model, model)
  if 'best' in (aug, reg, wd) and row not in table:
    raise ValueError(
        f'AugReg has no best setting for {model} on {dataset}.\n'
        f'Give aug, reg and wd, or take one of {", ".join(table)}.')
  best = table.get(row, ('', 0.0, 0.0))
  name = best[0] if aug == 'best' else aug
  if name.startswith('file:'):
    name = AUGREG_FILES.get(name.removeprefix('file:'), name)
  if name not in AUGREG:
    raise ValueError(choices.unknown(
        name, [*AUGREG, *(f'file:{n}' for n in AUGREG_FILES)], 'aug'))
  return (*AUGREG[name], best[1] if reg == 'best' else float(reg),
          best[2] if wd == 'best' else float(wd))


def set_data(c, data):
  """Points `c.input` at what an argument `data` names.

  Args:
    c: config.
    data: a folder, a file that ends in .npz, tfds:NAME[:VERSION] or digits.
  """
  if data == 'digits':
    c.input.source = data
  elif data.startswith('tfds:'):
    c.input.source, c.input.path = 'tfds', data.removeprefix('tfds:')
  else:
    c.input.source = 'arrays' if data.endswith('.npz') else 'folder'
    c.input.path = data


# Studies (configs/studies/): scale -> shortest length in epochs, of which they
# take 1, 2, 4 and 8 times; that of random search; seeds; sizes by depth. The
# digits are 300 images, at which errors are neither all low nor all noise.
STUDY_SCALES = {
    'digits': dict(base=10.0, search=40.0, seeds=10, space='digits',
                   depths={'4': 'micro', '12': 'micro-deep'}),
    'cifar10': dict(base=5.0, search=20.0, seeds=3, space='cifar',
                    depths={'4': 'micro', '12': 'micro-deep'}),
    'imagenet': dict(base=50.0, search=50.0, seeds=1, space='vit',
                     depths={'12': '4GF', '48': '16GF'}),
}


def study(name, args):
  """A study without arms, over seeds; see `studies.plan.trials_of`.

  Args:
    name: of its file.
    args: with `scale`; `seeds`, where it has that.
  """
  seeds = args.get('seeds', 0) or STUDY_SCALES[args.scale]['seeds']
  return ConfigDict(dict(
      name=name, scale=args.scale, arms=(),
      points=dict(kind='seeds', count=seeds)))


def sweep(name, args):
  """A study of one arm: a config at points of a space.

  Args:
    name: of the study.
    args: with `config`, `space`, `trials`, `seed` and `points`, as the flags.
  """
  # TPE's points are asked for one by one; the random ones stand for them.
  kind = {'tpe': 'random'}.get(args.points, args.points)
  return ConfigDict(dict(
      name=name, scale='', arms=(('sweep', args.config, (), args.space),),
      points=dict(kind=kind, count=args.trials, seed=args.seed)))


def study_lengths(args):
  """Epochs of the runs of a study of length: 1, 2, 4 and 8 times the base."""
  base = args.base or STUDY_SCALES[args.scale]['base']
  return [base * times for times in (1, 2, 4, 8)]


def study_arm(label, args, stem, optimizer='adamw', epochs=0.0, size=''):
  """An arm of a study: a config beside it, and what is changed in that.

  Args:
    label: of the arm.
    args: with `scale`, `data` and `per_class`.
    stem, optimizer: as in the configs.
    epochs: 0: those of random search.
    size: '': that of the scale; imagenet: 4GF.

  Returns:
    A tuple of one arm, as `studies.plan.Arm`.
  """
  scale = STUDY_SCALES[args.scale]
  if args.scale != 'digits' and not args.data:
    raise ValueError(f'scale={args.scale} needs data.\n'
                     'Give data=PATH, or data=tfds:NAME:VERSION.')
  run = dict(stem=stem, optimizer=optimizer, epochs=epochs or scale['search'])
  changes = {'input.validation': 0.1}
  if args.per_class:
    changes['input.per_class'] = args.per_class
  if args.scale == 'digits':
    file = 'digits.py'
    changes |= {'input.validation': 0.5,
                'input.per_class': args.per_class or 30,
                'model.size': size or 'micro', 'eval.every_steps': 0,
                'checkpoint.every_steps': 0}
  elif args.scale == 'cifar10':
    file = 'from_scratch_small.py'
    run = dict(optimizer=optimizer, epochs=run['epochs'], data=args.data,
               crop='pad')
    changes |= {'model.stem': stem, 'model.size': size or 'micro',
                'eval.every_steps': 0}
  else:
    file = 'vit_c_i1k.py'
    run |= dict(data=args.data, size=size or '4GF', epochs=int(run['epochs']),
                settings='simple' if size == '16GF' else 'tuned')
    changes['input.validation'] = 0.01
  text = ','.join(f'{key}={value}' for key, value in run.items())
  return ((label, f'../{file}:{text}', tuple(changes.items()),
           f'{scale["space"]}-{optimizer}'),)


def smoke(c):
  """Shrinks a config to four steps of a small model on small made images.

  Everything else stays: ops, augmentation, loss, optimizer, schedule's form.

  Args:
    c: config; changed.

  Returns:
    c.
  """
  if c.input.source != 'digits':
    c.input.update(source='made', path='', holdout=0.25, stream=False,
                   data_dir='', train_split='train', eval_split='',
                   only_classes=())
    for evaluator in c.evaluators.values():
      evaluator.split = 'val'
  c.input.update(num_train=0, num_classes=0)
  for size, small in ((224, 64), (256, 72)):
    for key in ('pp', 'eval_pp'):
      c.input[key] = c.input[key].replace(f'({size}', f'({small}')
  c.global_batch_size, c.eval.batch_size = 8, 8
  c.precise_bn.examples = min(c.precise_bn.examples, 16)
  family = c.model.size.partition('-')[0]
  if family in ('BiT', 'Mixer'):
    c.model.size = f'{family}-micro'
  elif not c.model.size.startswith('R') and c.model.stem != 'S4':
    c.model.size = 'micro'
  if 'scan' in c.model:
    c.model.scan = True  # one block compiles, whatever the depth
  if 'batch_norm_group' in c.model:
    c.model.batch_norm_group = min(c.model.batch_norm_group, 4)
  for section, key, steps in (
      (c, 'total', 4), (c.schedule, 'warmup', 1), (c.log, 'every', 1),
      (c.eval, 'every', 0), (c.checkpoint, 'every', 0)):
    for unit in ('steps', 'epochs', 'examples', 'percent'):
      if f'{key}_{unit}' in section:
        del section[f'{key}_{unit}']
    section[f'{key}_steps'] = steps
  return c


def parse_args(text, **defaults):
  """Parses the text after the colon: 'stem=conv,size=4GF'.

  Args:
    text: str or None.
    **defaults: by name; a tuple lists the choices, its first the default. The
      type of the default is the type of the argument. For a boolean, its name
      alone means True.

  Returns:
    ConfigDict with a value for each name.

  Raises:
    ValueError: unknown name, unknown choice or wrong type.
  """
  args = {k: v[0] if isinstance(v, tuple) else v for k, v in defaults.items()}
  for part in filter(None, (text or '').split(',')):
    name, equals, value = (s.strip() for s in part.partition('='))
    if name not in defaults:
      raise ValueError(choices.unknown(name, defaults, 'config argument'))
    if not equals and isinstance(args[name], bool):
      args[name] = True
      continue
    if not equals:
      raise ValueError(f'The config argument {name!r} has no value.\n'
                       f'Write {name}={args[name]}')
    if isinstance(defaults[name], tuple) and value not in map(
        str, defaults[name]):
      raise ValueError(
          choices.unknown(value, defaults[name], f'value of {name}'))
    args[name] = _convert(name, value, type(args[name]))
  return ConfigDict(args)


def _convert(name, value, kind):
  try:
    if kind is bool:
      return {'true': True, '1': True, 'false': False, '0': False}[
          value.lower()]
    return kind(value)
  except (ValueError, KeyError):
    raise ValueError(f'{name}={value}: not a {kind.__name__}.\n'
                     f'Write {name}=<{kind.__name__}>') from None
