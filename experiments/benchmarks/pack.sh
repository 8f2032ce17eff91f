#!/usr/bin/env bash
# Packs all that a machine without network needs to measure its device: wheels, the source, and a script that installs
# and runs both.
#
#     experiments/benchmarks/pack.sh PYTHON CONSTRAINTS ACCELERATOR
#
# PYTHON must have the version, and this machine the kind of processor, of the machine that is packed for. ACCELERATOR is
# an extra of JAX, such as cuda12, cuda13 or tpu; cpu adds none. Writes runs/issgd-jax-ACCELERATOR.tar.
set -euo pipefail
python=$(command -v "$1") constraints=$(realpath "$2") accelerator=$3 root=$(cd "$(dirname "$0")/../.." && pwd)
name=issgd-jax-$accelerator
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1
mkdir --parents "$folder/$name/source" "$root/runs"
(cd "$root" && git ls-files -z --cached --others --exclude-standard | tar --create --null --files-from=-) | tar --extract --directory="$folder/$name/source"

requirements=("issgd-jax[train]")
if [ "$accelerator" != cpu ]; then requirements+=("jax[$accelerator]"); fi
"$python" -m pip wheel --quiet --no-deps --wheel-dir="$folder/$name/wheels" "$folder/$name/source"
rm -rf "$folder/$name/source/build" "$folder/$name/source"/*.egg-info
# Wheels of what has none too, which there could not be built.
"$python" -m pip wheel --quiet -c "$constraints" --find-links="$folder/$name/wheels" --wheel-dir="$folder/$name/wheels" "${requirements[@]}"

version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
git -C "$root" describe --always --dirty --abbrev=40 --exclude='*' >"$folder/$name/commit" || true
cat >"$folder/$name/run.sh" <<SCRIPT
#!/usr/bin/env bash
# Installs into ./environment, once, and measures the device: ./run.sh [--size=small|full] [--parts=...]
set -euo pipefail
cd "\$(dirname "\$0")"
if [ ! -e environment/complete ]; then
  "\${PYTHON:-python$version}" -m venv --clear environment
  environment/bin/python -m pip install --quiet --no-index --find-links=wheels ${requirements[@]@Q}
  touch environment/complete
fi
cd source
exec ../environment/bin/python -m experiments.benchmarks.accelerator --out=../accelerator.json "\$@"
SCRIPT
chmod +x "$folder/$name/run.sh"
tar --create --file="$root/runs/$name.tar" --directory="$folder" "$name"
du --human-readable "$root/runs/$name.tar"
echo "there, with Python $version:  tar xf $name.tar && $name/run.sh"
