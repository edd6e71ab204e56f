"""Prints the device that jax sees; exits 1 with the remedy where the machine has an accelerator that jax does not see.

python .ci/device.py cpu|cuda|tpu      # what the machine was found to have
"""

import os
import sys

import jax

expected = sys.argv[1]
try:
    devices = jax.devices()
except RuntimeError as error:
    sys.exit(f"longattn: jax finds no device: {error}")
platform, kind = devices[0].platform, devices[0].device_kind
print(f"Device: {len(devices)} x {kind}, platform {platform}, {os.cpu_count()} cores, jax {jax.__version__}")
if expected != "cpu" and platform == "cpu":
    chosen = os.environ.get("JAX_PLATFORMS")
    remedy = (
        f"unset JAX_PLATFORMS={chosen}"
        if chosen
        else "free it if another process holds it, update its driver, or run `make clean` and try again"
    )
    sys.exit(
        f"longattn: this machine has a {expected} device, but jax sees only the CPU: {remedy}; EXTRA=cpu uses the CPU"
    )
