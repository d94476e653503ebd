"""The command heal: an edit, or norms that are moved or inserted, and a training of a few minutes."""

import argparse

from llama_mini import lab
from llama_mini.errors import NumericalError, RequestError
from llama_mini.lab.command_io import read_ids, read_model, read_settings, read_text, save_model, show
from llama_mini.lab.editing import Edits
from llama_mini.lab.healing_texts import training_text
from llama_mini.lab.reporting.healing_figure import healing_picture
from llama_mini.model.llama import Llama

_FITTED_ON = 1024  # tokens


def heal(args: argparse.Namespace) -> None:
    """Runs the command. Raises LlamaMiniError."""
    settings = read_settings(args.settings)
    if bool(settings) + args.insert + (args.to is not None) > 1:
        raise RequestError("give an edit, --insert or --to, and only one of them: norms are edited, inserted or moved")
    model, tokenizer = read_model(args)
    if args.pattern is None:
        args.pattern = _last_third(model, args.insert)
    text = None if args.train is None else tokenizer.encode(read_text(args.train))
    by_default = (args.text, args.offset, args.tokens, args.rows, args.bos) == (None, 0, 256, 1, False)
    held_out = None if by_default else read_ids(tokenizer, args)
    change: Edits | Llama = {args.pattern: settings}
    kept_frozen = "freeze" in settings and args.save is not None  # as the kind that a plan can express
    if kept_frozen or not settings:
        fitted_on = (training_text(tokenizer).tolist() if text is None else text)[:_FITTED_ON]
        if kept_frozen:
            change = lab.edited(model, change, fitted_on)
        elif args.insert:
            change = lab.insert(model, args.pattern, fitted_on)
        else:
            change = lab.move_fitted(model, args.pattern, args.to or "out", fitted_on)
    options = {name: getattr(args, name) for name in ("minutes", "seed", "steps", "taper", "control", "folder")}
    healed = lab.heal(model, change, tokenizer=tokenizer, text=text, held_out=held_out, **options)
    if healed.after.error is None:
        save_model(args, healed.model)  # first: whoever reads the table may stop reading
    show(args, healed.table(), lambda: healing_picture(healed))
    if not (args.json or args.csv):
        print(healed.summary())
    if healed.after.error is not None:
        raise NumericalError(f"the trained model has no cost: {healed.after.error}")


def _last_third(model: Llama, insert: bool) -> str:
    """The feed-forward norms of the last third of the layers, or the slots after them: the quickest to train."""
    n_layers = len(model.layers)
    return f"layers.{2 * n_layers // 3}-{n_layers - 1}.feed_forward.{'out' if insert else 'pre'}_norm"
