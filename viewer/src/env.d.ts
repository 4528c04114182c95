/** True in the one-file build, which has no server behind it. */
declare const __SINGLE__: boolean;
