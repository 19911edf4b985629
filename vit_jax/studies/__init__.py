"""Many runs as one experiment: spaces, the ledger of trials, what they show.

A study is a list of trials that is known before the first one starts: `arms`
(configs) times `points` (what is set in them: rates, decays, seeds). Trial i is
a pure function of the study's config, so any number of workers, on any number
of machines, in any order, make the same table.

  plan.py      a study's config -> its trials
  spaces.py    ranges of (lr, weight decay), and the points drawn from them
  ledger.py    which trials are taken, done or lost (Optuna's storage)
  worker.py    takes trials and trains them
  analysis.py  EDFs, bootstrap, paired intervals
  report.py    tables and figures (figures.py) as Markdown and HTML
"""
