"""The proof: on every rank, each name is stepped once, live, whole, at its planned rate."""

from dist_layerlr.proof.effect import effect_check as effect_check
from dist_layerlr.proof.reapply import check_group_layout, group_layout
from dist_layerlr.proof.reapply import reapply as reapply
from dist_layerlr.proof.steer import put_in_force as put_in_force
from dist_layerlr.proof.steer import steer as steer
from dist_layerlr.proof.verify import Proof as Proof
from dist_layerlr.proof.verify import verify as verify

# The public names of these two. Inside the package "manifest" means checkpoint.json alone.
manifest = group_layout
check_manifest = check_group_layout
