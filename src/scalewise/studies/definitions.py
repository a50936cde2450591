"""Claims of the paper as studies on the mini.

Claim texts and variant names are keys of stored JSON files: changing one makes older results unreadable.
"""

from __future__ import annotations

from scalewise.studies.base import Claim, Start, Study, Variant

FULL_SCALE = "schedule.full_scale=true"
MMD_ONLY = "loss.mmd_only=true"
# Sigma is the median distance of the features; the weight makes the gradient as large as with the linear
# kernel. With the released sigma of 100, three times that distance, the gradient is 70 times smaller, and
# the variant behaves as without MMD (docs/log.md).
RBF = ("loss.mmd.kernel=rbf", "loss.mmd.sigma=null", "loss.mmd.weight=8")
DISTILLED = ("teacher", "undistilled")  # same weights: the difference is what distillation can gain
TWO_STEPS = ("schedule.timesteps=[1000,737.056]", "schedule.scales=[16,16]")
SMALL = (
    "The teacher has 7.8 M parameters and 16 x 16 latents; iterations, batch size and LoRA are those of the "
    "recipe `mini`. The metrics are Fréchet distance and CLIP score with the scorer of the mini, instead of "
    "FID, PickScore and HPSv3."
)

SCALE_VS_FULL = Study(
    "scale-vs-full",
    "Scale-wise against full-scale students",
    "section 5.2, tables 7 and 8",
    (
        Variant("teacher", sampler="teacher"),
        Variant("scale-wise, 4 steps"),
        Variant("full-scale, 4 steps", (FULL_SCALE,)),
        Variant("full-scale, 2 steps", TWO_STEPS),
        Variant("undistilled", sampler="undistilled"),
    ),
    (
        Claim("with as many steps it is as good", "scale-wise, 4 steps", "full-scale, 4 steps", DISTILLED),
        Claim("in about the same time it is better", "scale-wise, 4 steps", "full-scale, 2 steps"),
        Claim("it comes near the teacher", "scale-wise, 4 steps", "teacher", DISTILLED),
    ),
    SMALL,
)

LOSSES = Study(
    "losses",
    "The loss and its MMD term",
    "section 5.3, table 6",
    (
        Variant("full loss"),
        Variant("MMD alone", (MMD_ONLY,)),
        Variant("without MMD", ("loss.mmd.weight=0",)),
        Variant("A: RBF kernel", RBF),
        Variant("B: tokens averaged over the batch", ("loss.mmd.whole_batch=true",)),
        Variant("C: features of clean samples", ("loss.mmd.clean=true",)),
    ),
    (
        Claim("the full loss is better than MMD alone", "full loss", "MMD alone"),
        Claim("the full loss is better than the loss without MMD", "full loss", "without MMD"),
        Claim("MMD alone is better than the loss without it", "MMD alone", "without MMD"),
        Claim("an RBF kernel is as good", "A: RBF kernel", "full loss", ("full loss", "without MMD"), 0.5),
        Claim("averaging over the batch is worse", "full loss", "B: tokens averaged over the batch"),
        Claim("clean features are worse", "full loss", "C: features of clean samples"),
    ),
    SMALL
    + " The RBF kernel uses the median distance of the features as sigma instead of 100. Its term has weight "
    "8, so that its gradient with respect to x0 is as large as with the linear kernel (`mmd/gradient_norm` "
    "in the logs).",
)

SCHEDULES = Study(
    "schedules",
    "Growing against constant scales",
    "appendix E, table 9",
    (
        Variant("8 10 12 16"),
        Variant("10 10 10 16", ("schedule.scales=[10,10,10,16]",)),
        Variant("8 8 8 16", ("schedule.scales=[8,8,8,16]",)),
    ),
    (
        Claim("growing is better than a constant scale", "8 10 12 16", "10 10 10 16"),
        Claim("growing is better than a constant small scale", "8 10 12 16", "8 8 8 16"),
        Claim("the larger constant scale is better than the smaller", "10 10 10 16", "8 8 8 16"),
    ),
    SMALL
    + " There are four steps instead of six. The constant scales are 5/8 and 1/2 of the full side instead of "
    "1/2 and 1/4, because the dataset contains latents with sides of 8, 10, 12 and 16. The smaller one has "
    "79% of the tokens of the growing schedule, the larger one 99%.",
)

UNTRAINED_SCALES = Study(
    "untrained-scales",
    "Scale-wise sampling without scale-wise training",
    "section 4.1",
    (
        Variant("trained scale-wise"),
        Variant("trained at full scale, drawn scale-wise", (FULL_SCALE,), ("schedule.full_scale=false",)),
        Variant("trained at full scale, drawn so", (FULL_SCALE,)),
    ),
    (
        Claim(
            "scale-wise sampling needs scale-wise training",
            "trained scale-wise",
            "trained at full scale, drawn scale-wise",
        ),
    ),
    SMALL,
)

PIXEL_VS_LATENT = Study(
    "pixel-vs-latent",
    "Downscaling pixels against downscaling latents",
    "section 4.1",
    (Variant("pixels"), Variant("latents", ("data.downscale=latent",))),
    (Claim("downscaling in pixel space is better", "pixels", "latents"),),
    SMALL,
)

TIMESTEPS = (400, 600, 800)
UPSCALING = Study(
    "upscaling",
    "Upscaling before or after adding noise",
    "section 4.1, table 1",
    tuple(
        variant
        for t in TIMESTEPS
        for variant in (
            Variant(f"A, t = {t}", start=Start("noised", t)),
            Variant(f"B, t = {t}", start=Start("enlarged, noised", t)),
            Variant(f"C, t = {t}", start=Start("noised, enlarged", t)),
        )
    ),
    (
        *(
            Claim(f"at {t}, enlarging comes first (B, not C)", f"B, t = {t}", f"C, t = {t}")
            for t in TIMESTEPS
        ),
        Claim("at 400, enlarging costs quality (A, not B)", "A, t = 400", "B, t = 400"),
        Claim("at 800, it costs next to none", "B, t = 800", "A, t = 800", ("A, t = 400", "B, t = 400")),
    ),
    "The teacher of the mini (28 steps, guidance 4.5) continues from samples of its dataset instead of real "
    "images, and latents are upscaled from 8 x 8 to 16 x 16. The Fréchet distance is to the same number of "
    "other samples of the dataset. A: noise is added to the full-size latent. B: the small latent is "
    "upscaled, then noised. C: the small latent is noised, then upscaled. The paper only reports FID, whose "
    "Inception features respond to texture; there, C is 4 to 26 times as large as B. The scorer of the mini "
    "responds to subject and colors more than to fine lines, so the spectral distance is reported as well.",
    metrics=("frechet", "spectrum"),
)

STUDIES = {
    study.name: study
    for study in (UPSCALING, SCALE_VS_FULL, LOSSES, SCHEDULES, UNTRAINED_SCALES, PIXEL_VS_LATENT)
}
