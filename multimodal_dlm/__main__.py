"""`python -m multimodal_dlm` and `accelerate launch -m multimodal_dlm`."""

import sys

from multimodal_dlm.cli import main

if __name__ == "__main__":
    sys.exit(main())
