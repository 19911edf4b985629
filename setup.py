"""Installs `vit_jax` and its input pipeline.

The lower bounds are the oldest versions that the tests were run with, the
upper bounds the newest majors (for 0.x packages: minors) known to work.
"""
import os

from setuptools import setup

# What training and inference need; no TensorFlow among it.
CORE = [
    'jax>=0.10,<0.13',
    'flax>=0.12,<0.14',
    'optax>=0.2.6,<0.4',
    'orbax-checkpoint>=0.11.30,<0.13',
    'etils[epath]>=1.12,<2',
    'numpy>=2.0,<3',
    'ml_collections>=1.0,<2',
    'absl-py>=2.1,<3',
    'clu>=0.0.12,<0.1',
    'tensorboard>=2.19,<3',
    'scikit-learn>=1.5,<2',
    'pillow>=11,<14',
    'matplotlib>=3.9,<4',
    'rich>=13,<16',
    'packaging>=24',
    'flatbuffers>=24.3,<27',  # jax.export writes with it
]
# What the tf.data pipeline needs (folders of images, TFDS).
# tensorflow-datasets does not depend on tensorflow: name both.
# VIT_JAX_NO_TENSORFLOW=1 pip install -e .   leaves them out.
TENSORFLOW = [
    'tensorflow>=2.19,<3',
    'tensorflow-datasets>=4.9.8,<5',
    'importlib_resources>=6,<8',  # tfds's command line needs it unsaid
]

setup(
    name='vit-early-conv',
    version='0.1.0',
    description=(
        'ViT with patchify and convolutional stems, and AugReg, in JAX/Flax'),
    license='Apache-2.0',
    python_requires='>=3.11,<3.14',
    packages=[
        'vit_jax', 'vit_jax.augment', 'vit_jax.commands', 'vit_jax.evaluators',
        'vit_jax.models', 'vit_jax.pretrained', 'vit_jax.studies',
        'input_pipeline',
    ],
    install_requires=CORE + (
        [] if os.environ.get('VIT_JAX_NO_TENSORFLOW') else TENSORFLOW),
    extras_require={
        'gpu': ['jax[cuda13]>=0.10,<0.13'],
        'tpu': ['jax[tpu]>=0.10,<0.13'],
        # The compiler for TPUs, for vit-jax plan and bench tpu-compile: what
        # jax[tpu] 0.10.0 (0.0.40) and 0.10.2 (0.0.42) ask for.
        'plan': ['libtpu>=0.0.40,<0.0.43'],
        'study': ['optuna>=4,<6'],  # vit-jax sweep, vit-jax study
        'test': ['pytest>=8,<10', 'pytest-xdist>=3.6,<4', 'ruff>=0.9,<1',
                 'optuna>=4,<6'],
        'wandb': ['wandb>=0.19,<1'],
        'torch': ['torch>=2.6,<3'],  # to read .pth, .pyth and .bin files
        # What tests/test_against_torch.py compares with.
        'crosscheck': ['torch>=2.6,<3', 'torchvision>=0.21,<1',
                       'timm>=1.0.15,<2', 'transformers>=4.50,<6'],
        'notebooks': ['nbformat>=5,<6', 'nbclient>=0.10,<1', 'ipykernel>=6,<8'],
    },
    entry_points={'console_scripts': ['vit-jax = vit_jax.__main__:main']},
)
