# Sourced by .ci/run. Makes two environments, and activates the first one:
# $venv has the package with its [dev] requirements. $newest sees these too, but has the newest fastai and fastcore.
# Both are a cache, made anew whenever the requirements change.
key=$(cat settings.ini setup.py .ci/run tools/ci_environment.sh | sha256sum | cut -c1-16)
python=${PYTHON:-python3}
cache=${BIJDIFF_CI_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/bijdiff-ci}
venv=$cache/$("$python" -c 'import sys; print("py%d.%d" % sys.version_info[:2])')-$key
newest=$venv/newest

site_packages() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

if [ -e "$venv/complete" ]; then
  . "$venv/bin/activate"
  python -m pip install -q --no-deps -e . || fail 'pip install -e . failed'
else
  rm -rf "$cache"
  mkdir -p "$cache"
  "$python" -m venv "$venv" || fail "python -m venv does not work; install Python's venv module"
  . "$venv/bin/activate"
  # a CPU build of torch first, where one is to be had; otherwise whatever the index gives
  python -m pip install -q torch==2.13.0 torchvision==0.28.0 ||
    echo 'no CPU build of torch at hand: taking what the index has'
  python -m pip install -q -e ".[dev]" ||
    fail 'pip install -e ".[dev]" failed; see above for the requirement that cannot be met'

  "$python" -m venv "$newest" || fail "python -m venv does not work; install Python's venv module"
  echo "import site; site.addsitedir('$(site_packages "$venv")')" > "$(site_packages "$newest")/beside.pth"
  "$newest/bin/python" -m pip install -q -U fastcore fastai ||
    fail 'the newest fastai and fastcore cannot be installed beside our requirements; limit them in settings.ini'

  # fastai requires torchvision, which does not import beside the CPU build of torch and takes transformers with it
  python -m pip uninstall -q -y torchvision || fail 'torchvision cannot be uninstalled; remove the folder of caches'
  touch "$venv/complete"
fi
