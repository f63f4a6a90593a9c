"""Browser demo: which training images made this picture?

    python demo.py --checkpoint weights/emoji_effnet+minilm.pth --data_dir data/emoji --port 7860
    python demo.py --checkpoint weights/dino+clip_text.pth --data_dir data/coco    # released data
    python demo.py --bundle runs/bundle --data_dir data/emoji                      # see python -m serving.bundle

Pick a stored test query, generate an emoji, or upload a picture and type its prompt. Shown are the training images that
the tuned ranker finds most influential, shares by creator, the neighbours under the untuned features, for stored
queries the teacher's own top images, and the time taken. The released data names no creators and the demo has no model
that draws such pictures, so there the page lacks shares and generation.

A bundle is served from its index as it is at that moment: what `python -m fastgda.index remove` removes is in no answer
from then on. Without the data folder that it was built from, the page has no stored queries and shows captions only.

All of it goes by HTTP, too: see serving/page.py. The server listens on 127.0.0.1 and asks nothing of the internet; its
log goes to standard error, one JSON object a line.
"""

from __future__ import annotations

import logging
import sys

from fastgda.core import command_line, command_parser, relative
from fastgda.flags import add_flags, from_flags
from serving.guard import LOG, Service
from serving.limits import Limits
from serving.loading import DemoConfig, load_world
from serving.page import build_app, finish, launch, signals


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = command_parser("python demo.py", __doc__)
    for cls in (DemoConfig, Limits):
        add_flags(parser, cls)
    args = parser.parse_args(argv)
    config, limits = from_flags(DemoConfig, args), from_flags(Limits, args)
    world = load_world(config, limits)
    handler = logging.StreamHandler()
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    app = build_app(world)
    service = Service(limits, lambda: {"training_images": len(world.collection), "ranker": world.how["ranker"]})
    with signals() as stop:
        url = launch(app, service, config.host, config.port)
        print(f"{relative(config.bundle or config.ranker)}: serving on {url} (Ctrl-C stops)", flush=True)
        stop.wait()
        finish(app, service)
    LOG.removeHandler(handler)


if __name__ == "__main__":
    sys.exit(main())
