"""Average the backbones of two saved pipelines: share 0 is the first, 1 the second.

A stage of training that is about one task takes something from the others; a mean of the weights
before and after it often keeps most of both (Wortsman et al. 2022, arXiv 2109.01903, section 3).
The result is the second pipeline with averaged weights, saved in bfloat16.

    python examples/average_weights.py FIRST SECOND --share 0.55 --output runs/averaged
"""

import argparse

import torch

from multimodal_dlm.pipelines import load_pipeline


def main() -> None:
    """Load both, average, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("first", help="folder of a saved pipeline, such as the stage before")
    parser.add_argument("second", help="folder of another with the same shapes")
    parser.add_argument("--share", type=float, default=0.5, help="of the second, from 0 to 1")
    parser.add_argument("--output", required=True, help="folder that is written")
    options = parser.parse_args()
    if not 0 <= options.share <= 1:
        parser.error(f"`--share` must lie in [0, 1]; got {options.share}. Use 0.5.")
    first, second = (load_pipeline(folder) for folder in (options.first, options.second))
    others = first.transformer.state_dict()
    configs = [dict(pipe.transformer.config) for pipe in (first, second)]
    for name, value in configs[0].items():
        if not name.startswith("_") and value != (other := configs[1].get(name)):
            parser.error(f"Both must have the same `{name}`; got {value!r:.60} and {other!r:.60}.")
    with torch.no_grad():
        for name, weight in second.transformer.state_dict().items():
            weight.lerp_(others[name].to(weight.dtype), 1 - options.share)
    second.transformer.bfloat16()
    second.save_pretrained(options.output)
    print(f"Saved {options.output}: {options.share:g} of {options.second}.")


if __name__ == "__main__":
    main()
