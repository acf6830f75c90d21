# What the jobs in this folder share; they source it. Bash.
#
#   megaswitch_job WORDS...   runs a step, passes the scheduler's warning on to it, and queues the job
#                             again unless it is over
#
# Settings, by `sbatch --export=ALL,NAME=VALUE` or in the script:
#
#   MEGASWITCH     how ranks start MegaSwitch; default: megaswitch of the PATH
#   RESTARTS       how often a job that failed by itself is queued again (default 10); one that was
#                  stopped in time, or whose node died, is queued again without end
#   NODE_RANGE     of a job that may go on with fewer nodes, the same as its --nodes=6-8
#   IMAGE          a container image, or nothing; with ENGINE=pyxis (default) or apptainer
#   MOUNTS         folders that the container sees, such as /scratch,/home; default: the current one

MEGASWITCH=${MEGASWITCH:-megaswitch}
RESTARTS=${RESTARTS:-10}
ENGINE=${ENGINE:-pyxis}
MOUNTS=${MOUNTS:-$PWD}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# Words for srun, and words between srun and MegaSwitch, that put a step into a container.
STEP=() INSIDE=()
if [ -n "${IMAGE:-}" ]; then
  case $ENGINE in
    pyxis)
      STEP=(--container-image="$IMAGE" --container-workdir="$PWD")
      for folder in ${MOUNTS//,/ }; do mounted=${mounted:+$mounted,}$folder:$folder; done
      STEP+=(--container-mounts="$mounted") ;;
    apptainer)
      INSIDE=(apptainer exec --nv --pwd "$PWD")
      for folder in ${MOUNTS//,/ }; do INSIDE+=(--bind "$folder"); done
      INSIDE+=("$IMAGE") ;;
    *) echo "ENGINE=$ENGINE must be pyxis or apptainer" >&2; exit 2 ;;
  esac
fi

_again() { # _again WHY: queue this job again, which ends this script
  echo "job $SLURM_JOB_ID: $1; queued again (start number $((${SLURM_RESTART_COUNT:-0} + 2)))"
  trap '' TERM USR1
  scontrol requeue "$SLURM_JOB_ID" # or SLURM has done it, because a node died
  [ -z "${NODE_RANGE:-}" ] || _fit_nodes
  sleep 300
  exit 1
}

# SLURM would keep the number of tasks that the job had, and with it all of its nodes. It takes the
# change once the job is waiting; until it ends this script there is time for that (KillWait).
_fit_nodes() {
  local tasks=$((${NODE_RANGE%-*} * ${SLURM_NTASKS_PER_NODE:-1}))
  for _ in {1..25}; do
    if scontrol update JobId="$SLURM_JOB_ID" NumTasks="$tasks" 2>/dev/null; then
      scontrol update JobId="$SLURM_JOB_ID" NumNodes="$NODE_RANGE"
      return
    fi
    sleep 1
  done
  echo "job $SLURM_JOB_ID: cannot ask for $NODE_RANGE nodes; it waits for as many as it had" >&2
}

# Starts the step in the background, since the shell hears signals only while it waits. `wait` comes
# back at a signal, so that it is called until the step is really gone. All ranks get the signal, end
# the step they are at, save a checkpoint and exit with code 130.
megaswitch_job() {
  local step status=0 asked=
  "$@" &
  step=$!
  trap 'asked=yes; kill -"${STOP:-USR1}" "$step" 2>/dev/null' USR1 TERM
  while :; do
    wait "$step"; status=$?
    kill -0 "$step" 2>/dev/null || break
  done
  trap - USR1 TERM
  echo "job $SLURM_JOB_ID: the step ended with code $status${asked:+ after a signal}"
  case $status in
    0) return 0 ;;               # complete
    2) return 2 ;;               # refused: the message says what to change
  esac
  [ -z "$asked" ] || _again "stopped before the time limit or by preemption"
  if [ "$status" = 130 ]; then return 130; fi # stopped on purpose: scancel --signal=USR1 JOB.0
  [ "${SLURM_RESTART_COUNT:-0}" -ge "$RESTARTS" ] || _again "failed"
  return "$status"
}
