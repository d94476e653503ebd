"""The settings of an edit as `--help` lists them. It stands by itself, since help does not wait for torch."""

SETTINGS_HELP = """\
settings, any of them together; a value may also be JSON, as in Python:
  eps=1e-3          the number inside the root
  kind=layer        rms, layer, scale, l2, prms, crms, group, power, frozen, dyt or derf;
                    also fills empty slots
  gain=0.5          all gains; one, or mean: their mean; scale:2 multiplies them;
                    dims:3,507 sets these dimensions to 0; '[0.9, 1.2, ...]' is a vector;
                    '{"dims": [3, 507], "gain": 0.5}' sets these dimensions to 0.5
  alpha=0.7         the α of dyt and derf; groups=4: of group; power=0.5: of power
  cast=late         round after the gain; early: before
  skip=true         leave the norms out
  freeze=quadratic  divide by one number, measured on the text: the root of the mean
                    square; arithmetic: the mean of the RMS; median; token: each token's
                    own number, as it is in the unchanged model
  keep=first        with freeze, tokens that keep their own statistic: first (default),
                    none, massive (RMS above 2.5 times the median), massive:4,
                    positions 0,5, token ids ids:1,2, or several: first+ids:1,2
"""
